"""What a run needs before it is paid for: memory, disk, tokens, FLOPs and time, from shapes alone."""
