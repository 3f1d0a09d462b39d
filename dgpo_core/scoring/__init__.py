"""Answer metrics and statistics (docs/method.md, "Equations")."""
