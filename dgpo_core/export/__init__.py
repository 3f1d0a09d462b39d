"""Trained models in the forms that other programs take: GGUF, a model card, a Modelfile."""
