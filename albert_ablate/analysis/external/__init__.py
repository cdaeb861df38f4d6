"""Runs that another trainer made: tables, W&B projects, TensorBoard and MLflow, as `load_runs` reads its own."""
