"""The search protocol: prompts and tags, actions, and the record of an episode (method.md, section 1)."""
