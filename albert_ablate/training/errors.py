"""Error of a training run that is neither the user's mistake (ConfigError) nor another process's lock (Busy)."""


class RunFailed(RuntimeError):
    """Training or evaluation broke after the run had begun; the run's record holds the traceback."""
