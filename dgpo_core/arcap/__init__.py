"""ARCap (source referencing, query rewriting, thinking; paper, section 5), and diagnosis beyond it."""
