"""Append-only, crash-safe columnar histories (Arrow).

While a run goes on, a history is an Arrow IPC stream `<name>.arrows` that only grows; what counts is its committed
length, kept beside it, since a torn or zero-filled tail can look like data. When the run is done it is rewritten into
one Arrow IPC file `<name>.arrow`.
"""

import hashlib
import io
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from albert_ablate.records.atomic import open_own, replace_file

_AXES = [("step", pa.int64()), ("tokens", pa.int64()), ("seconds", pa.float64()), ("flops", pa.float64())]
_SPLIT = [("split", pa.string()), ("loss", pa.float64()), ("bits_per_byte", pa.float64())]
_STEP = ("loss", "lr", "grad_norm", "clipped", "grad_norm_clipped", "noise_scale", "logit_rms")
_LAYER = (
    *("grad_norm", "weight_norm", "update_ratio", "input_rms", "output_rms", "output_mean"),
    *("residual_rms", "residual_mean", "entropy", "max_logit", "dead", "saturated", "dropout", "clipped", "clip_ratio"),
)
SCHEMAS = {
    # a row per optimizer step: loss of the training batch, learning rate, gradient norm before and after clipping,
    # share clipped, gradient noise scale (tokens; nan but on the logged steps that measure it), root mean square of the
    # output logits
    "steps": pa.schema([*_AXES, *((name, pa.float64()) for name in _STEP)]),
    # a row per evaluation and split, in evaluation mode; data_order: chained hash of the batches so far
    "evals": pa.schema(
        [*_AXES, *_SPLIT, ("perplexity", pa.float64()), ("accuracy", pa.float64()), ("data_order", pa.string())],
    ),
    # a row per logged step, block and sublayer ("attention" or "mlp"), what does not apply being nan
    # (training/diagnostics.py says what each is); those of step 0 are the initialization
    "layers": pa.schema(
        [*_AXES, ("layer", pa.int32()), ("sublayer", pa.string()), *((name, pa.float64()) for name in _LAYER)],
    ),
}
BATCH_ROWS = 200
END = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow stream


# in the metadata of a history's schema
DIGEST = b"digest"  # of a finished history's rows
RUN = b"run"  # identity of the run whose rows they are


class DamagedHistory(ValueError):
    """Raised for a history file whose rows are not those that were written."""


class History:
    """Writer of the growing history `name` in `folder`: `append` rows, `commit` them. run: the run's identity."""

    def __init__(self, folder: Path, name: str, run: str = ""):
        self.path, self.schema = folder / f"{name}.arrows", SCHEMAS[name].with_metadata({RUN: run})
        self.pending: list[Mapping] = []
        self._file: io.FileIO | None = None
        self._hash = hashlib.sha256()  # of the committed bytes

    @property
    def digest(self) -> str:
        """SHA-256 of the bytes written so far."""
        return self._hash.hexdigest()

    def cut(self, length: int) -> None:
        """Open the history and truncate it to its committed length: rows behind it were never committed."""
        self.close()
        fd = open_own(self.path)
        self._file = io.FileIO(fd, "r+", closefd=True)
        if length > self._file.seek(0, os.SEEK_END):
            self.close()
            raise OSError(f"{self.path} is shorter than what was committed; remove the run folder to start again")
        self._file.truncate(length)
        self._hash = _prefix_hash(self.path, length)
        self._file.seek(length)
        if length and _schemas(self.path, length)[-1] != self.schema:
            self._write(pa.py_buffer(END))  # a release with other columns began it: a second stream follows the first
            length = 0
        if length == 0:
            self._write(self.schema.serialize())

    def table(self) -> pa.Table:
        """The committed rows as an Arrow table."""
        assert self._file is not None
        return _conform(read_stream(self.path, self._file.tell()), SCHEMAS[self.path.stem])

    def append(self, **row) -> None:
        """Add a row, in memory until the next commit."""
        self.pending.append(row)

    def commit(self) -> int:
        """Write and fsync pending rows; returns the committed length in bytes."""
        assert self._file is not None
        for start in range(0, len(self.pending), BATCH_ROWS):
            rows = self.pending[start : start + BATCH_ROWS]
            columns = [_column([row[f.name] for row in rows], f.type) for f in self.schema]
            self._write(pa.record_batch(columns, schema=self.schema).serialize())
        self.pending = []
        os.fsync(self._file.fileno())
        return self._file.tell()

    def _write(self, buffer: pa.Buffer) -> None:
        assert self._file is not None
        view = memoryview(buffer)
        self._hash.update(view)
        while view:
            view = view[self._file.write(view) :]

    def finish(self) -> None:
        """Write all committed rows into a finished Arrow file, one batch, beside the stream."""
        length = self.commit()
        if _prefix_hash(self.path, length).hexdigest() != self.digest:
            raise DamagedHistory(f"{self.path} was changed after it was written")
        table = _conform(read_stream(self.path, length), self.schema).combine_chunks()
        table = table.replace_schema_metadata({**self.schema.metadata, DIGEST: _rows_digest(table)})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        replace_file(self.path.with_suffix(".arrow"), sink.getvalue().to_pybytes())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


class NoHistory(History):
    """Stands in for a history on ranks that write no files: every method does nothing."""

    def __init__(self) -> None:
        pass

    def cut(self, length: int) -> None:
        pass

    def append(self, **row) -> None:
        pass

    pending = []

    digest = ""

    def commit(self) -> int:
        return 0

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass


def _column(values: list, kind: pa.DataType) -> pa.Array:
    """An Arrow array of numbers or texts. `pa.array` would import pandas: 27 MB and half a second of a training run."""
    if pa.types.is_string(kind):
        texts = [value.encode() for value in values]
        offsets = np.cumsum([0, *map(len, texts)], dtype=np.int32)
        return pa.StringArray.from_buffers(len(texts), pa.py_buffer(offsets), pa.py_buffer(b"".join(texts)))
    numbers = np.array(values, dtype=kind.to_pandas_dtype())
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(numbers)])


def values_of(column: pa.ChunkedArray) -> np.ndarray:
    """The values of a history's column as an array, of texts as objects. `to_numpy` would import pandas."""
    kind = column.type
    if pa.types.is_string(kind):
        return np.array(column.to_pylist(), object)
    if column.null_count or not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        return column.to_numpy()
    dtype = np.dtype(kind.to_pandas_dtype())
    chunks = [c for c in column.chunks if len(c)]
    parts = [np.frombuffer(c.buffers()[1], dtype, len(c), c.offset * dtype.itemsize) for c in chunks]
    return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, dtype), *parts])


def _prefix_hash(path: Path, length: int) -> Any:
    """SHA-256 of the first `length` bytes of a file, or of what there is of them."""
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while length and (part := file.read(min(length, 1 << 20))):
            hasher.update(part)
            length -= len(part)
    return hasher


def is_whole(folder: Path, name: str, length: int, digest: str | None) -> bool:
    """Whether a growing history still has its committed bytes; by length alone if an older release kept no digest."""
    path = folder / f"{name}.arrows"
    if not length:
        return True
    if not path.exists() or path.stat().st_size < length:
        return False
    return not digest or _prefix_hash(path, length).hexdigest() == digest


def _rows_digest(table: pa.Table) -> str:
    """SHA-256 of the columns' names and values, in order."""
    hasher = hashlib.sha256()
    for name, column in zip(table.column_names, table.columns, strict=True):
        hasher.update(f"{name} {column.type} {len(column)} ".encode())
        if pa.types.is_string(column.type):
            hasher.update("\0".join("\1" if text is None else text for text in column.to_pylist()).encode())
        else:
            hasher.update(values_of(column).tobytes())
    return hasher.hexdigest()


def read_stream(path: Path, length: int) -> pa.Table:
    """Read the rows in the first `length` bytes of a growing history, with all columns it has ever had."""
    return pa.concat_tables(_parts(path, length), promote_options="default")


def _parts(path: Path, length: int) -> list[pa.Table]:
    """The streams that a growing history consists of, one after the other: one, unless its columns have changed."""
    with path.open("rb") as file:
        source = pa.BufferReader(file.read(length))
    parts: list[pa.Table] = []
    while not parts or source.tell() < length:
        parts.append(pa.ipc.open_stream(source).read_all())
    return parts


def _schemas(path: Path, length: int) -> list[pa.Schema]:
    return [part.schema for part in _parts(path, length)]


def _conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The columns of `schema`: numbers that an older release did not write are nan, texts null."""
    if table.schema == schema:
        return table
    columns = []
    for field in schema:
        numbers = pa.types.is_floating(field.type)
        if field.name not in table.column_names:
            missing = _column([math.nan] * len(table), field.type) if numbers else pa.nulls(len(table), field.type)
            columns.append(pa.chunked_array([missing]))
        else:
            column = table[field.name]
            columns.append(column.fill_null(math.nan) if numbers and column.null_count else column)
    return pa.table(columns, schema=schema)


def _check_run(table: pa.Table, file: str, run: str | None) -> None:
    """Raise DamagedHistory where the rows are those of another run; older releases did not write whose they are."""
    whose = (table.schema.metadata or {}).get(RUN, b"").decode("ascii", "replace")
    if run and whose and whose != run:
        raise DamagedHistory(f"{file} is that of another run, {whose}")


def read_history(folder: Path, name: str, lengths: Mapping[str, int] | None, run: str | None = None) -> pa.Table:
    """Read the history `name` of a run folder: steps, evals or layers.

    lengths: committed bytes of each history from the record, None once the run is done. run: identity that the history
    must have. Whatever release wrote it, the table has the columns of this one: missing numbers are nan, missing texts
    null. Raises DamagedHistory if the rows are not those that were written, or belong to another run.
    """
    schema = SCHEMAS[name]
    if lengths is not None:
        if not lengths.get(name):
            return schema.empty_table()
        try:
            table = read_stream(folder / f"{name}.arrows", lengths[name])
            _check_run(table, f"{name}.arrows", run)
            return _conform(table.replace_schema_metadata(None), schema)
        except FileNotFoundError:
            pass  # the run has ended since its record was read
    # read whole: mapping a file of some kilobytes into memory takes three times as long
    table = pa.ipc.open_file(pa.BufferReader((folder / f"{name}.arrow").read_bytes())).read_all()
    digest = (table.schema.metadata or {}).get(DIGEST)  # an older release kept none
    if digest is not None and digest.decode("ascii", "replace") != _rows_digest(table):
        raise DamagedHistory(f"{name}.arrow is damaged: its rows do not match their checksum")
    _check_run(table, f"{name}.arrow", run)
    return _conform(table.replace_schema_metadata(None), schema)
