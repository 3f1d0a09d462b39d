"""Answer metrics and statistics (method.md, section 2)."""
