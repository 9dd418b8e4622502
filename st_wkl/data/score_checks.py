"""Rows of a score store, and one checksum for all scores of a query, so that a flipped bit is found when it is read.

The checksums stand in a table of their own, beside which the tables of earlier versions are what they were: such a
version reads and writes the file as before, and triggers take away the checksum of what it wrote.
"""

from __future__ import annotations

import sqlite3
from array import array
from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from typing import Any
from zlib import crc32

import numpy as np

from st_wkl.data.teacher import TextPairs

_OF = "WHERE teacher = ?1 AND query = ?2"
# Queries that one statement reads: a statement for each takes twice as long where it has a score or two.
_AT_ONCE = 1_000
# Rows that one statement writes: half the time of one for each. SQLite's old limit is 999 values.
_ROWS = 240
_MOST_ROWS = 10_000  # in memory as Python's objects, beside those of one query
_TRIGGER = (
    "CREATE TRIGGER IF NOT EXISTS scores_after_{0} AFTER {0} ON scores BEGIN "
    "DELETE FROM checks WHERE teacher = {1}.teacher AND query = {1}.query; END"
)
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS checks (teacher INTEGER NOT NULL, query BLOB NOT NULL, checksum INTEGER NOT NULL, "
    "PRIMARY KEY (teacher, query)) WITHOUT ROWID",
    _TRIGGER.format("INSERT", "NEW"),
    _TRIGGER.format("UPDATE", "OLD"),
    _TRIGGER.format("DELETE", "OLD"),
)
_NAME = b""  # in place of a query: of the teacher's identity


def prepare_checks(connection: sqlite3.Connection) -> None:
    """Make room for checksums where there is none; the caller has begun a transaction."""
    if not has_checks(connection):
        for statement in _SCHEMA:
            connection.execute(statement)


def has_checks(connection: sqlite3.Connection) -> bool:
    """Return whether the store has checksums, which those of earlier versions have not."""
    return connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'checks'").fetchone() is not None


def read_scores(
    connection: sqlite3.Connection, teacher: int, queries: Iterable[bytes], *, checked: bool
) -> Iterator[tuple[bytes, tuple[bytes, ...], tuple[float, ...], bool]]:
    """Yield each of some queries that has scores: its documents, their scores, and whether they are as written."""
    asked = sorted(queries)  # as they lie in the file
    for start in range(0, len(asked), _AT_ONCE):
        part = asked[start : start + _AT_ONCE]
        of = f"WHERE teacher = ?1 AND query IN ({','.join(f'?{place}' for place in range(2, len(part) + 2))})"
        statement = f"SELECT query, document, score FROM scores {of}"
        if checked:  # in one statement, between whose halves no other process writes
            statement = f"SELECT query, NULL, checksum FROM checks {of} UNION ALL {statement}"
        written: dict[bytes, Any] = {}
        for query, rows in groupby(connection.execute(statement, (teacher, *part)), key=itemgetter(0)):
            _, documents, scores = zip(*rows, strict=True)
            if documents[0] is None:
                written[query] = scores[0]
                documents, scores = documents[1:], scores[1:]  # where a query has both halves to itself
            if documents:
                check = written.pop(query, None)
                yield query, documents, scores, check is None or check == _checksum(query, documents, scores)
        for query in written:  # has lost all its scores
            yield query, (), (), False


def write_scores(connection: sqlite3.Connection, teacher: int, pairs: TextPairs, scores: np.ndarray) -> None:
    """Write scores of pairs and the checksum of all that each query has; what is there and differs is deleted."""
    (queries, query_ranks), (documents, document_ranks) = pairs.hashes()
    keys = query_ranks[pairs.keys // len(documents)]
    keys *= len(documents)
    keys += document_ranks[pairs.keys % len(documents)]
    order = np.argsort(keys, kind="stable")  # as they lie in the file
    bounds = np.flatnonzero(np.diff(keys[order] // len(documents), prepend=-1, append=-1))
    del keys
    is_new = connection.execute("SELECT 1 FROM scores WHERE teacher = ? LIMIT 1", (teacher,)).fetchone() is None
    start, last_bound = 0, len(bounds) - 1
    while start < last_bound:
        stop = int(np.searchsorted(bounds, bounds[start] + _MOST_ROWS, side="right")) - 1
        stop = max(start + 1, min(stop, start + _AT_ONCE, last_bound))
        ends, start = bounds[start : stop + 1].tolist(), stop
        part = order[ends[0] : ends[-1]]
        rows, columns = np.divmod(pairs.keys[part], len(documents))
        asked = [queries[row] for row in rows[np.array(ends[:-1]) - ends[0]].tolist()]
        # SQLite keeps -0.0 as 0.0: a checksum of it would differ for ever.
        hashes, values = [documents[column] for column in columns.tolist()], (scores[part] + 0.0).tolist()
        stored: dict[bytes, dict[bytes, float]] = {}
        for query, found, known, sound in () if is_new else list(read_scores(connection, teacher, asked, checked=True)):
            if sound:
                stored[query] = dict(zip(found, known, strict=True))
            else:
                connection.execute(f"DELETE FROM scores {_OF}", (teacher, query))
        flat: list[Any] = []
        checks = []
        for query, first, last in zip(asked, ends, ends[1:], strict=False):
            there = slice(first - ends[0], last - ends[0])
            new = dict(zip(hashes[there], values[there], strict=True))
            for document, value in new.items():
                flat += (teacher, query, document, value)
            every = dict(sorted({**stored[query], **new}.items())) if query in stored else new
            checks.append((teacher, query, _checksum(query, every.keys(), every.values())))
        for place in range(0, len(flat), 4 * _ROWS):
            block = flat[place : place + 4 * _ROWS]
            values_of = ",".join(["(?,?,?,?)"] * (len(block) // 4))
            connection.execute(f"INSERT OR REPLACE INTO scores VALUES {values_of}", block)
        connection.executemany("INSERT OR REPLACE INTO checks VALUES (?, ?, ?)", checks)


def seal(connection: sqlite3.Connection, lists: Iterable[tuple[int, bytes]]) -> None:
    """Write the checksums that some lists lack, each a teacher's scores of a query."""
    there = f"SELECT 1 FROM checks {_OF}"
    lacking: dict[int, list[bytes]] = {}
    for teacher, query in lists:
        if connection.execute(there, (teacher, query)).fetchone() is None:
            lacking.setdefault(teacher, []).append(query)
    for teacher, queries in lacking.items():
        for query, documents, scores, _ in list(read_scores(connection, teacher, queries, checked=False)):
            checksum = _checksum(query, documents, scores)
            connection.execute("INSERT OR REPLACE INTO checks VALUES (?, ?, ?)", (teacher, query, checksum))


def name_teacher(connection: sqlite3.Connection, teacher: int) -> None:
    """Write the checksum of a teacher's identity if it has none."""
    statement = "SELECT CAST(identity AS BLOB) FROM teachers WHERE id = ?"
    (identity,) = connection.execute(statement, (teacher,)).fetchone()
    connection.execute("INSERT OR IGNORE INTO checks VALUES (?, ?, ?)", (teacher, _NAME, crc32(identity)))


def differing(connection: sqlite3.Connection) -> Iterator[str]:
    """Yield what is not as it was written, by reading everything."""
    if not has_checks(connection):
        return
    written = f"SELECT checksum FROM checks {_OF}"
    for teacher, identity in connection.execute("SELECT id, CAST(identity AS BLOB) FROM teachers").fetchall():
        found = connection.execute(written, (teacher, _NAME)).fetchone()
        if found is not None and found[0] != crc32(identity):
            yield f"the identity of teacher {teacher}"
    everything = connection.execute("SELECT teacher, query, document, score FROM scores ORDER BY 1, 2, 3")
    for (teacher, query), rows in groupby(everything, key=itemgetter(0, 1)):
        found = connection.execute(written, (teacher, query)).fetchone()
        if found is not None and found[0] != _checksum(query, *zip(*(row[2:] for row in rows), strict=True)):
            yield f"the scores of the query with hash {query.hex()}"
    lost = (
        "SELECT query FROM checks WHERE query <> x'' AND NOT EXISTS (SELECT 1 FROM scores "
        "WHERE scores.teacher = checks.teacher AND scores.query = checks.query)"
    )
    for (query,) in connection.execute(lost):
        yield f"the scores of the query with hash {bytes(query).hex()}, of which there are none any more"


def _checksum(query: bytes, documents: Iterable[bytes] = (), scores: Iterable[float] = ()) -> int:
    """Return a checksum of a query's scores in the order of the documents; -1 for what no score can be."""
    try:
        return crc32(b"".join(documents), crc32(array("d", scores).tobytes(), crc32(query)))
    except TypeError:
        return -1
