"""The checks of `dgpo doctor`, a file for each kind of thing: each returns findings and raises nothing."""
