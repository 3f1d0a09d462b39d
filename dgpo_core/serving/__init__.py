"""The agent for people: an episode that is told while it unfolds, and the service around it."""
