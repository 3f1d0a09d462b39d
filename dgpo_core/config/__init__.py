"""The one schema of params.yaml (`params.Params`); the defaults are the paper's values (table 8)."""
