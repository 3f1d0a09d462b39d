"""Encoders and the Qdrant index."""
