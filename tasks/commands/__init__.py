"""The commands of `dgpo`, a file each."""
