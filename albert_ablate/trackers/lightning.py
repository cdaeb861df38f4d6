"""Any Lightning logger as a tracker: CSV, Comet, Neptune, SwanLab, Aim and others."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from albert_ablate.config import ConfigError, nearest
from albert_ablate.records.checked import read_checked, write_checked
from albert_ablate.records.naming import display_name
from albert_ablate.trackers.base import Rows, Tracker, merged, settings, status_of, summary_metrics

SENT_FILE = "sent_to_loggers.json"  # logger -> step of the last row that it has got


class LightningTracker(Tracker):
    """Tracker around a `pytorch_lightning.loggers.Logger`: hyperparameters, metrics over tokens, the status at the end.

    Such a logger cannot be asked what it has received, so that is noted in the run folder after each push, and a
    resumed run sends what is missing. A run that was killed between a push and its note sends these rows twice. Whether
    the logger continues its own run is set by its options (`version` of CSVLogger, `experiment_key` of Comet).
    """

    def __init__(self, logger: Any, layers: bool = False):
        super().__init__(layers)
        self.logger, self.NAME = logger, type(logger).__name__

    def begin(self, folder: Path, record: Mapping, rows: Rows) -> None:
        self.folder, self.run = folder, record["identity"]
        try:
            self.notes = read_checked(folder / SENT_FILE, self.run)
        except (OSError, ValueError):
            self.notes = {}
        self.latest, self.tokens = int(self.notes.get(self.NAME, -1)), 0
        self.logger.log_hyperparams({"run": display_name(record), **settings(record)})
        latest = self.latest
        self.push({name: [r for r in history_rows if r["step"] > latest] for name, history_rows in rows.items()})

    def push(self, rows: Rows) -> None:
        for row in merged(rows, self.latest + 1, self.layers):
            self.latest, self.tokens = max(self.latest, row["step"]), max(self.tokens, row["tokens"])
            self.logger.log_metrics({k: v for k, v in row.items() if k != "tokens"}, step=row["tokens"])
        self.logger.save()
        self.notes[self.NAME] = self.latest
        write_checked(self.folder / SENT_FILE, self.notes, self.run)

    def end(self, record: Mapping) -> None:
        summary = {f"summary/{k}": v for k, v in summary_metrics(record).items()}
        self.logger.log_metrics(summary, step=self.tokens)
        self.logger.save()
        ended = {"finished": "success", "diverged": "success", "stopped": "aborted"}
        self.logger.finalize(ended.get(status_of(record), "failed"))


def lightning_logger(name: str, options: dict | None = None, layers: bool = False) -> LightningTracker:
    """The logger of `pytorch_lightning.loggers` with this name and these arguments.

    name: CSVLogger, CometLogger, NeptuneLogger, MLFlowLogger, ... Loggers of other packages (SwanLab, Aim) are named
    by `_target_` in an option of one's own. layers: every layer's values instead of min, median and max over
    depth.
    """
    from pytorch_lightning import loggers

    classes = [n for n in loggers.__all__ if n != "Logger"]
    if name not in classes:
        raise ConfigError(f"logger.name={name} is not allowed: it is one of {nearest(name, classes)}.")
    try:
        logger = getattr(loggers, name)(**(options or {}))
    except ModuleNotFoundError as error:
        raise ConfigError(f"{name} needs a package that is not installed: {' '.join(str(error).split())}.") from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} does not take logger.options={dict(options or {})}: {error}.") from None
    return LightningTracker(logger, layers)


class TrackioLogger:
    """Trackio with the methods of a Lightning logger. A resumed run continues the same run of the project."""

    def __init__(self, project: str, space: str | None, group: str | None):
        self.project, self.space, self.group = project, space, group
        self.run: Any = None

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Begin the run on Trackio, or go on with it, with its configuration."""
        import trackio

        name = f"{params['run']} ({params['setting'][:6]})"
        config = {k: v if isinstance(v, str | int | float | bool | None) else str(v) for k, v in params.items()}
        self.run = trackio.init(
            project=self.project, name=name, group=self.group or params["arm"], space_id=self.space, config=config,
            resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Send metrics of a step."""
        self.run.log(dict(metrics), step=step)

    def save(self) -> None:
        """Trackio writes by itself."""

    def finalize(self, status: str) -> None:
        """Finish the run, with whether it ended well."""
        self.run.log({"ended_well": float(status == "success")})
        self.run.finish()


class Trackio(LightningTracker):
    """A run of Trackio (Hugging Face's local tracker): `trackio show --project albert_ablate` draws it.

    project: null is albert_ablate. space: a Space of Hugging Face's hub to send to, instead of this machine's store.
    group: null is the arm. layers: every layer's values instead of min, median and max over depth.
    """

    PACKAGE, EXTRA = "trackio", "trackio"
    NAME = "Trackio"

    def __init__(
        self, project: str | None = None, space: str | None = None, group: str | None = None, layers: bool = False
    ):
        super().__init__(TrackioLogger(project or "albert_ablate", space, group), layers)
        self.NAME = "Trackio"
