"""Checksums inside a score store: one for all scores of a query, so that a flipped bit is found when they are read.

They stand in a table of their own, beside which the tables of earlier versions are what they were: such a version reads
and writes the file as before, and triggers take away the checksum of what it wrote.
"""

from __future__ import annotations

import sqlite3
from array import array
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from operator import itemgetter
from typing import Any
from zlib import crc32

_OF = "WHERE teacher = ?1 AND query = ?2"
_SCORES = f"SELECT document, score FROM scores {_OF}"
# Queries that one statement reads: a statement for each takes twice as long where it has a score or two.
_AT_ONCE = 1_000
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

Scores = list[tuple[bytes, float]]

# By SQLite's code of an error, or by a word of those that have none.
_AGAIN = "then start again: it continues where it stopped."
_ANY_REMEDY = f"Check free space, permissions and other processes, {_AGAIN}"
_REMEDIES: dict[int | str, str] = {
    "closed": "It was closed, by close() or at the end of its `with` block: keep it open, or open it again.",
    "thread": "Each thread needs a ScoreStore of its own; they may share the file.",
    sqlite3.SQLITE_BUSY: f"Another process is writing. Wait for it or stop it, {_AGAIN}",
    sqlite3.SQLITE_FULL: f"Free some space on the disk, {_AGAIN}",
    sqlite3.SQLITE_READONLY: f"Give yourself the right to write to the file and its folder, {_AGAIN}",
}


def prepare_checks(connection: sqlite3.Connection) -> None:
    """Make room for checksums where there is none; the caller has begun a transaction."""
    if not has_checks(connection):
        for statement in _SCHEMA:
            connection.execute(statement)


def has_checks(connection: sqlite3.Connection) -> bool:
    """Return whether the store has checksums, which those of earlier versions have not."""
    return connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'checks'").fetchone() is not None


def read_scores_of(
    connection: sqlite3.Connection, teacher: int, queries: Iterable[bytes], *, checked: bool
) -> Iterator[tuple[bytes, list[bytes], list[float], bool]]:
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
            documents, scores = [], []
            for _, document, value in rows:
                if document is None:
                    written[query] = value
                else:
                    documents.append(document)
                    scores.append(value)
            if documents:
                check = written.pop(query, None)
                yield query, documents, scores, check is None or check == _checksum(query, documents, scores)
        for query in written:  # has lost all its scores
            yield query, [], [], False


def write_scores_of(connection: sqlite3.Connection, teacher: int, lists: Mapping[bytes, Mapping[bytes, float]]) -> None:
    """Write scores of queries and the checksum of all each has; what is there and not as it was written is deleted."""
    stored: dict[bytes, dict[bytes, float]] = {}
    for query, documents, scores, sound in list(read_scores_of(connection, teacher, lists, checked=True)):
        if sound:
            stored[query] = dict(zip(documents, scores, strict=True))
        else:
            connection.execute(f"DELETE FROM scores {_OF}", (teacher, query))
    for query, new in lists.items():
        connection.executemany(
            "INSERT OR REPLACE INTO scores VALUES (?, ?, ?, ?)",
            [(teacher, query, document, score) for document, score in new.items()],
        )
        _seal(connection, teacher, query, sorted((stored.get(query, {}) | dict(new)).items()))


def seal(connection: sqlite3.Connection, teachers: Iterable[int]) -> None:
    """Write the checksums that some teachers' scores lack."""
    statement = (
        "SELECT DISTINCT query FROM scores WHERE teacher = ?1 AND NOT EXISTS "
        "(SELECT 1 FROM checks WHERE checks.teacher = ?1 AND checks.query = scores.query)"
    )
    for teacher in teachers:
        name_teacher(connection, teacher)
        for (query,) in connection.execute(statement, (teacher,)).fetchall():
            rows = connection.execute(_SCORES, (teacher, query)).fetchall()
            _seal(connection, teacher, query, rows)


def name_teacher(connection: sqlite3.Connection, teacher: int) -> None:
    """Write the checksum of a teacher's identity if it has none."""
    statement = "SELECT CAST(identity AS BLOB) FROM teachers WHERE id = ?"
    (identity,) = connection.execute(statement, (teacher,)).fetchone()
    connection.execute("INSERT OR IGNORE INTO checks VALUES (?, ?, ?)", (teacher, _NAME, crc32(identity)))


def differing(connection: sqlite3.Connection) -> Iterator[str]:
    """Yield what is not as it was written, by reading everything."""
    if not has_checks(connection):
        return
    written = "SELECT checksum FROM checks WHERE teacher = ? AND query = ?"
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


def _seal(connection: sqlite3.Connection, teacher: int, query: bytes, rows: Scores) -> None:
    connection.execute(
        "INSERT OR REPLACE INTO checks VALUES (?, ?, ?)", (teacher, query, _checksum(query, *zip(*rows, strict=True)))
    )


def _checksum(query: bytes, documents: Iterable[bytes] = (), scores: Iterable[float] = ()) -> int:
    """Return a checksum of a query's scores in the order of the documents; -1 for what no score can be."""
    try:
        return crc32(b"".join(documents), crc32(array("d", scores).tobytes(), crc32(query)))
    except TypeError:
        return -1


def remedy(error: sqlite3.DatabaseError) -> str:
    """Return what to do about an error that is no damage."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK) & 0xFF
    return next((text for sign, text in _REMEDIES.items() if sign in (code, *str(error).split())), _ANY_REMEDY)
