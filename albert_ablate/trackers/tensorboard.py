"""TensorBoard tracker: event files in the run folder, written with the `tensorboard` package alone."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from albert_ablate.records.folder import plain
from albert_ablate.trackers.base import AXES, Rows, Tracker, merged, settings, status_of, summary_metrics


class TensorBoard(Tracker):
    """One event file in RUN_FOLDER/tensorboard: a scalar per metric of the histories, its step the tokens so far.

    Scalars are float32, as TensorBoard's are; `step`, `seconds` and `flops` are scalars too. An event's time is the
    run's beginning plus its seconds of training. A resumed run is written anew from its first row, so that a killed
    session leaves no row twice. The configuration is text and hyperparameters; at the end come the summary's figures as
    `summary/...` and the status. See them by name with `tensorboard --logdir runs/by-name`. layers: every layer's
    values instead of min, median and max over depth.
    """

    def __init__(self, layers: bool = False):
        super().__init__(layers)

    NAME, SYNC, PACKAGE, EXTRA = "TensorBoard", "tensorboard", "tensorboard", "tensorboard"

    def begin(self, folder: Path, record: Mapping, rows: Rows) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        place = folder / "tensorboard"
        place.mkdir(exist_ok=True)
        for earlier in place.glob("events.out.tfevents.*"):  # all it held is in the histories
            earlier.unlink()
        self.created, self.latest, self.seconds, self.tokens = record["created"], -1, 0.0, 0
        # another name each session: a reader that holds the old file open turns to the new one
        file = place / f"events.out.tfevents.{int(self.created)}.{record['sessions']}"
        self.writer = RecordWriter(file.open("xb"))
        self._event(file_version="brain.Event:2")
        configuration = settings(record)
        self._text("config", "```\n" + "\n".join(f"{k}: {json.dumps(v)}" for k, v in configuration.items()) + "\n```")
        self._session(start=configuration, record=record)
        self.push(rows)

    def push(self, rows: Rows) -> None:
        for row in merged(rows, self.latest + 1, self.layers):
            late = row["step"] < self.latest  # its axes would be there twice
            values = {k: v for k, v in row.items() if not (k == "tokens" or late and k in AXES)}
            self.latest = max(self.latest, row["step"])
            self.seconds, self.tokens = max(self.seconds, row["seconds"]), max(self.tokens, row["tokens"])
            self._scalars(values, row["tokens"], row["seconds"])
        self.writer.flush()

    def end(self, record: Mapping) -> None:
        self._scalars({f"summary/{k}": v for k, v in summary_metrics(record).items()}, self.tokens, self.seconds)
        self._text("status", status_of(record))
        self._session(end=status_of(record))
        self.writer.flush()
        self.writer.close()

    def _event(self, step: int = 0, seconds: float = 0.0, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self.writer.write(Event(wall_time=self.created + seconds, step=step, **content).SerializeToString())

    def _scalars(self, values: Mapping[str, float], tokens: int, seconds: float) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in values.items()])
        self._event(tokens, seconds, summary=summary)

    def _text(self, tag: str, text: str) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.text.metadata import create_summary_metadata
        from tensorboard.util.tensor_util import make_tensor_proto

        value = Summary.Value(
            tag=tag, tensor=make_tensor_proto(text.encode()), metadata=create_summary_metadata(tag, "")
        )
        self._event(self.tokens, self.seconds, summary=Summary(value=[value]))

    def _session(self, start: Mapping | None = None, record: Mapping | None = None, end: str | None = None) -> None:
        """A session of TensorBoard's hyperparameter plugin: the settings at its start, the outcome at its end."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams import metadata, plugin_data_pb2
        from tensorboard.plugins.hparams.api_pb2 import Status

        if start is not None and record is not None:
            info = plugin_data_pb2.SessionStartInfo(group_name=record["identity"], start_time_secs=self.created)
            for key, value in start.items():
                field = info.hparams[key]
                if isinstance(value, bool):
                    field.bool_value = value
                elif isinstance(value, int | float):
                    field.number_value = value
                else:
                    field.string_value = value if isinstance(value, str) else json.dumps(plain(value))
            tag, data = metadata.SESSION_START_INFO_TAG, plugin_data_pb2.HParamsPluginData(session_start_info=info)
        else:
            kind = {"finished": "STATUS_SUCCESS", "diverged": "STATUS_SUCCESS", "failed": "STATUS_FAILURE"}
            over = plugin_data_pb2.SessionEndInfo(
                status=Status.Value(kind.get(end or "", "STATUS_UNKNOWN")), end_time_secs=self.created + self.seconds
            )
            tag, data = metadata.SESSION_END_INFO_TAG, plugin_data_pb2.HParamsPluginData(session_end_info=over)
        value = Summary.Value(tag=tag, metadata=metadata.create_summary_metadata(data), tensor=metadata.NULL_TENSOR)
        self._event(summary=Summary(value=[value]))
