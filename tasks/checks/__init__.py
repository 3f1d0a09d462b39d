"""What `dgpo doctor` looks at, a file for each kind of thing. Every check returns findings and raises
nothing."""
