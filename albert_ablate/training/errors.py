"""What a training run raises that is not the user's mistake (ConfigError) and not another process's lock (Busy)."""


class RunFailed(RuntimeError):
    """Training or evaluation broke after the run had begun; the run's record holds the traceback."""
