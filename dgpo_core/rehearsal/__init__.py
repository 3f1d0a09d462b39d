"""A profile made small: the same stages, families and formats on random weights, in minutes on any
machine."""
