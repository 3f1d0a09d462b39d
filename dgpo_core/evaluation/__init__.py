"""Measurements of an agent: exact match, ARCap (paper, section 5), diagnosis, comparisons, promotion."""
