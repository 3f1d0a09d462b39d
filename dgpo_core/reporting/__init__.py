"""The report of a run: results, comparisons and ARCap as JSON, and one self-contained page."""
