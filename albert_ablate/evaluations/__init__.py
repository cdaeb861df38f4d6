"""What can be asked of kept weights: one class and one YAML (conf/evaluation) each, done at the end or on demand."""
