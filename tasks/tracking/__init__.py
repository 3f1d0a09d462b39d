"""What MLflow keeps: runs, traces, registered models and where they come from."""
