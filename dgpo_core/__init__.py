"""The science of DGPO: protocol, retrieval, rollouts, objectives, training and ARCap.

Nothing in here imports prefect, mlflow or dvc; `tasks` wires it into the pipeline.
"""
