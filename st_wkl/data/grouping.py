"""Scored pairs of any number to lists by query, in bounded memory: 41 bytes a text that was seen, the rest on disk.

polars' own streaming `group_by` keeps all different texts in memory (10 million triples of a million documents: 4.3
GB), and duckdb's lists do not leave memory either.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from st_wkl.data.tables import Where

_RUN = 500_000  # pairs of a sorted file, and of what is put into lists at once
_ROW_GROUP = 50_000
_HEX = np.array([list(f"{byte:02x}".encode()) for byte in range(256)], np.uint8)
NO_GAIN = np.iinfo(np.int32).min


class Ids:
    """Ids for texts that have none: a hash of the text, so that it does not matter in which order they come."""

    def __init__(self) -> None:
        self.keys, self.digests = np.empty(0, np.uint64), np.empty(0, np.uint64)

    def of(self, texts: pa.Array) -> pa.Array:
        """Return 16 hexadecimal digits for each text; a null text has those of an empty one."""
        found, first, back = np.unique(_hashes(texts), return_index=True, return_inverse=True)
        places = np.searchsorted(self.keys, found)
        new = np.flatnonzero(~_there(self.keys, found, places))
        # Only once for each text: most come again, and Python's loop takes longer than everything else.
        fresh = [text or "" for text in texts.take(pa.array(first[new])).to_pylist()]
        made = b"".join(
            hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in fresh
        )
        self.keys = np.insert(self.keys, places[new], found[new])
        self.digests = np.insert(self.digests, places[new], np.frombuffer(made, np.uint64))
        digests = self.digests[np.searchsorted(self.keys, found)][back]
        digits = _HEX[digests.view(np.uint8)].reshape(-1)
        ends = np.arange(len(back) + 1, dtype=np.int64) * 16
        return pa.Array.from_buffers(pa.large_string(), len(back), [None, pa.py_buffer(ends), pa.py_buffer(digits)])


def _there(known: np.ndarray, keys: np.ndarray, places: np.ndarray) -> np.ndarray:
    there = places < len(known)
    there[there] = known[places[there]] == keys[there]
    return there


class Texts:
    """Queries or documents: each id has one text, is kept once, and is numbered when a list first names it.

    Args:
        kind: `"query"` or `"document"`.
        file: Parquet file for the texts that come with the rows; None where all are known before.
    """

    def __init__(self, kind: str, file: Path | None) -> None:
        self.kind = kind
        self.schema = pa.schema({f"{kind}_id": pa.string(), "text": pa.string()})
        self.writer = None if file is None else pq.ParquetWriter(file, self.schema, compression="zstd")
        # Sorted hashes of ids, and in the same order hashes of texts, numbers from 0, −1 before the first use.
        self.keys, self.texts = np.empty(0, np.uint64), np.empty(0, np.uint64)
        self.numbers = np.empty(0, np.int64)
        self.written = np.empty(0, bool)
        self.names: list[pa.Array] = []  # of queries, in the order of their numbers
        self.used = 0

    def add(self, ids: pa.Array, texts: pa.Array, where: Where) -> None:
        """Take ids with their texts, of which many may be there already.

        Raises:
            ValueError: An id has another text than before; with the place.
        """
        keys, hashes = _hashes(ids), _hashes(texts)
        found, first, back = np.unique(keys, return_index=True, return_inverse=True)
        places = np.searchsorted(self.keys, found)
        known = _there(self.keys, found, places)
        expected = hashes[first]
        expected[known] = self.texts[places[known]]
        if len(wrong := np.flatnonzero(hashes != expected[back])):
            row = int(wrong[0])
            raise ValueError(
                f"{where(row)}: the {self.kind} id {ids[row].as_py()!r} has another text before than "
                f"{texts[row].as_py()[:60]!r} here. Ids must be unique: rename one, or leave the column of ids out."
            )
        new = ~known
        self.keys = np.insert(self.keys, places[new], found[new])
        self.texts = np.insert(self.texts, places[new], hashes[first][new])
        self.numbers = np.insert(self.numbers, places[new], -1)
        self.written = np.insert(self.written, places[new], self.writer is not None)
        if self.writer is not None and new.any():
            self._write(self.writer, ids, texts, first[new])

    def write_used(self, file: Path, parts: Iterable[tuple[pa.Array, pa.Array]]) -> None:
        """Write those of all known ids and texts that some list names, in their order."""
        with pq.ParquetWriter(file, self.schema, compression="zstd") as writer:
            for ids, texts in parts:
                found, first = np.unique(_hashes(ids), return_index=True)
                places = np.searchsorted(self.keys, found)
                fresh = (self.numbers[places] >= 0) & ~self.written[places]
                self.written[places[fresh]] = True
                self._write(writer, ids, texts, first[fresh])

    def _write(self, writer: pq.ParquetWriter, ids: pa.Array, texts: pa.Array, rows: np.ndarray) -> None:
        part = [column.take(pa.array(np.sort(rows))).cast(pa.string()) for column in (ids, texts)]
        writer.write_table(pa.Table.from_arrays(part, schema=self.schema))

    def numbers_of(self, ids: pa.Array, *, use: bool = False) -> np.ndarray:
        """Return the numbers of ids, −1 of those that no list names.

        Args:
            ids: Any.
            use: Number those that have no number yet; −1 then is an id without a text.
        """
        found, first, back = np.unique(_hashes(ids), return_index=True, return_inverse=True)
        places = np.searchsorted(self.keys, found)
        known = _there(self.keys, found, places)
        if use:
            fresh = np.flatnonzero(known)[self.numbers[places[known]] < 0]
            fresh = fresh[np.argsort(first[fresh])]
            self.numbers[places[fresh]] = self.used + np.arange(len(fresh))
            self.used += len(fresh)
            if self.kind == "query":
                self.names.append(ids.take(pa.array(first[fresh])).cast(pa.string()))
        numbers = np.full(len(found), -1, np.int64)
        numbers[known] = self.numbers[places[known]]
        return numbers[back]

    def close(self) -> None:
        """Finish the file of the texts."""
        if self.writer is not None:
            self.writer.close()

    def copies(self) -> int:
        """Return how many ids that are used have a text of an id before."""
        used = self.texts[self.numbers >= 0]
        return len(used) - len(np.unique(used))


def _hashes(column: pa.Array) -> np.ndarray:
    return pl.Series(pl.from_arrow(column)).hash().to_numpy()


class Pairs:
    """Pairs of a query and a document with score and gain, sorted on disk.

    Args:
        folder: Empty folder for the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.parts: list[pl.DataFrame] = []
        self.held = self.files = self.count = 0
        self.lengths = np.zeros(0, np.int64)  # of each query's list

    def add(self, query: np.ndarray, document: np.ndarray, ids: pa.Array, score: np.ndarray, gain: np.ndarray) -> None:
        """Take pairs, queries and documents by number; `NO_GAIN` and NaN stand for what is not there."""
        place = np.arange(self.count, self.count + len(query))
        columns = {"query": query, "document": document, "place": place, "score": score, "gain": gain}
        self.parts.append(pl.DataFrame(columns).with_columns(id=pl.Series(pl.from_arrow(ids))))
        self.count += len(query)
        self.held += len(query)
        if len(query):
            here = np.bincount(query, minlength=len(self.lengths))
            here[: len(self.lengths)] += self.lengths
            self.lengths = here
        if self.held >= _RUN:
            self._write()

    def _write(self) -> None:
        if self.parts:
            whole = pl.concat(self.parts).sort("query", "place")
            # lz4 is read as fast as it comes from the disk.
            whole.write_parquet(self.folder / f"{self.files:06d}.parquet", compression="lz4", row_group_size=_ROW_GROUP)
            self.parts, self.held, self.files = [], 0, self.files + 1
            pa.default_memory_pool().release_unused()  # else it keeps what the batches took, half a gigabyte and more

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Yield first and last query of parts of about half a million pairs."""
        self._write()
        ends, first = np.cumsum(self.lengths), 0
        while first < len(ends):
            before = ends[first - 1] if first else 0
            last = max(int(np.searchsorted(ends, before + _RUN, side="right")) - 1, first)
            yield first, last
            first = last + 1

    def between(self, first: int, last: int) -> pl.DataFrame:
        """Return the pairs of some queries, in the order in which they came."""
        self._write()
        files = sorted(self.folder.glob("*.parquet"))
        if not files:
            return pl.DataFrame(schema={"query": pl.Int64, "document": pl.Int64, "score": pl.Float32})
        found = pl.scan_parquet(files).filter(pl.col("query").is_between(first, last)).collect()
        return found.sort("query", "place")


def single(pairs: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return each pair once, with its first score and its highest gain, and of those that came twice how far apart.

    Args:
        pairs: Sorted by query and place.
    """
    both = pairs["query"] * (1 << 32) + pairs["document"]
    if both.n_unique() == len(pairs):
        return pairs, pairs.clear()
    grouped = pairs.group_by("query", "document", maintain_order=True).agg(
        pl.col("place", "id", "score").first(),
        pl.col("gain").max(),
        times=pl.len(),
        other=pl.col("score").sort_by((pl.col("score") - pl.col("score").first()).abs()).last(),
        gains=pl.col("gain").n_unique(),
    )
    return grouped.select(pairs.columns), grouped.filter(pl.col("times") > 1)


def lists(pairs: pl.DataFrame) -> tuple[np.ndarray, np.ndarray, pa.Array, np.ndarray, np.ndarray]:
    """Return queries, lengths of their lists, and document ids, scores and gains: positives first, else as it was."""
    pairs = pairs.sort("query", pl.col("gain") <= 0, "place")
    queries, lengths = np.unique(pairs["query"].to_numpy(), return_counts=True)
    ids = pc.cast(pairs["id"].to_arrow(), pa.string())
    gains = pairs["gain"].replace(int(NO_GAIN), 0).to_numpy()
    return queries, lengths, ids, pairs["score"].to_numpy(), gains
