"""Arrow tables of lists: columns as flat arrays, texts that many rows share, and fingerprints without a copy."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features

_INLINE = 12  # bytes of a text that Arrow keeps in the view itself
# A view counts bytes in 31 bits, so each part of 2**30 bytes is a buffer of its own, which overlaps the next.
_PART = 30


class Ragged:
    """A column of lists as one array of values, and where each row's begin.

    Args:
        column: Lists; a null counts as an empty one.
    """

    def __init__(self, column: pa.ChunkedArray) -> None:
        self.lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)
        self.values: pa.ChunkedArray = pc.list_flatten(column)
        self.starts = np.cumsum(self.lengths) - self.lengths

    @property
    def rows(self) -> np.ndarray:
        """The row of each value."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    def row_of(self, place: int) -> int:
        """Return the row of one value."""
        return int(np.searchsorted(self.starts + self.lengths, place, side="right"))


def columns(table: Dataset) -> pa.Table:
    """Return the columns of a table, in the order of its rows, copied only where rows were selected."""
    return table.with_format("arrow")[:]


def places_of(ids: pa.ChunkedArray, known: pa.ChunkedArray) -> np.ndarray:
    """Return where ids stand among the known ones, −1 where one does not."""
    return pc.fill_null(pc.index_in(ids, value_set=known.combine_chunks(), skip_nulls=True), -1).to_numpy()


def lists_of(lengths: np.ndarray, values: pa.Array | np.ndarray) -> pa.Array:
    """Return a column of lists, given their lengths and all their values one after another."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    if offsets[-1] >= 2**31:
        raise ValueError(
            f"Arrow's lists hold {2**31 - 1:,} values at most, and there are {offsets[-1]:,}. Split the rows."
        )
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))


class SharedTexts:
    """Texts that columns point at: 16 bytes for each place where a text stands, however long it is.

    Args:
        texts: The different texts; their bytes are shared, not copied.
    """

    def __init__(self, texts: pa.ChunkedArray) -> None:
        chunks = [chunk.cast(pa.large_string()) for chunk in texts.chunks]
        self.buffers: list[pa.Buffer] = []
        views = [np.zeros((0, 16), np.uint8)]
        for chunk in chunks:
            _, offsets, data = chunk.buffers()
            ends = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
            views += self._views(ends, data) if len(chunk) else []
        self.views = np.concatenate(views)

    def _views(self, ends: np.ndarray, data: pa.Buffer | None) -> list[np.ndarray]:
        """Return Arrow's views of a chunk's texts: length, then the text itself, or its beginning and where it is."""
        raw = np.frombuffer(data, np.uint8) if data is not None and data.size else np.zeros(1, np.uint8)
        starts, lengths = ends[:-1], np.diff(ends)
        views = np.zeros((len(starts), 16), np.uint8)
        numbers = views.view(np.int32)
        numbers[:, 0] = lengths
        for place in range(_INLINE):
            has = (lengths > place) & ((lengths <= _INLINE) | (place < 4))
            views[has, 4 + place] = raw[starts[has] + place]
        long = lengths > _INLINE
        parts = starts >> _PART
        for part in np.unique(parts[long]).tolist():
            begin = part << _PART
            of_part = long & (parts == part)
            numbers[of_part, 2] = len(self.buffers)
            numbers[of_part, 3] = starts[of_part] - begin
            self.buffers.append(data.slice(begin, int(ends[1:][of_part].max()) - begin))  # type: ignore[union-attr]
        return [views]

    def at(self, places: np.ndarray) -> pa.Array:
        """Return the texts at some places; an empty one where a place is below 0."""
        chosen = self.views[places]
        chosen[np.asarray(places) < 0] = 0
        return pa.Array.from_buffers(pa.string_view(), len(chosen), [None, pa.py_buffer(chosen), *self.buffers])


class _Digest:
    """A file that keeps nothing but the hash of what was written."""

    closed = False

    def __init__(self) -> None:
        self.hash = hashlib.blake2b(digest_size=8)

    def write(self, data: Any) -> int:
        self.hash.update(data)
        return len(data)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def as_dataset(table: pa.Table, features: Features) -> Dataset:
    """Return a table as a dataset whose fingerprint is a hash of what it holds, the same in every process.

    `datasets` would make one from a pickle, a second copy of everything.
    """
    if table.schema != features.arrow_schema:
        table = table.cast(features.arrow_schema)
    digest = _Digest()
    with pa.ipc.new_stream(pa.PythonFile(digest, mode="w"), table.schema) as stream:
        stream.write_table(table)
    return Dataset(table, fingerprint=digest.hash.hexdigest())
