"""Evaluations of trained weights: one class and one YAML (conf/evaluation) each, made after training or on demand."""
