"""The programs that dvc.yaml runs, one a stage (`python -m tasks.stages.<stage>`)."""
