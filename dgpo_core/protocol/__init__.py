"""Prompts and tags, actions, the record of an episode (docs/method.md, "The protocol")."""
