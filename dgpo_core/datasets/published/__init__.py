"""The published data sets of the paper's experiments, brought into the pipeline's form (docs/data.md)."""
