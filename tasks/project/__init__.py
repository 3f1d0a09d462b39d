"""The project on disk: paths, git, DVC, files, processes."""
