"""The search agent: its protocol, the loop that runs its episodes, and the engines that generate for it."""
