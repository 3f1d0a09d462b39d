"""The embedded world: a generated encyclopedia with questions, in the published formats."""
