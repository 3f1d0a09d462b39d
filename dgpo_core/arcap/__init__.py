"""ARCap: source referencing, query rewriting and thinking, measured apart (method.md, section 6)."""
