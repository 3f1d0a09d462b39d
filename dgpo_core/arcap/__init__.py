"""ARCap (source referencing, query rewriting, thinking; method.md, section 6), and diagnosis beyond it."""
