"""The science of DGPO: data sets, retrieval, the agent, objectives, training, evaluation and reports.

Nothing in here imports prefect, mlflow or dvc; `tasks` wires it into the pipeline.
"""
