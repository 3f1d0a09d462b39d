"""The embedded world: a generated encyclopedia with questions, and the models that are built on it."""
