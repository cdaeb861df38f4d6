"""Trackers (Weights & Biases, MLflow, TensorBoard): each mirrors the run folder."""
