"""The agent loop and the engines that generate for it."""
