"""Prefect: when and where the stages run. The graph itself is DVC's (`dvc.yaml`)."""
