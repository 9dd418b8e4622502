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
from zlib import crc32

_OF = "WHERE teacher = ?1 AND query = ?2"
_SCORES = f"SELECT document, score FROM scores {_OF}"
# In one statement: with few scores for a query, a second one would take longer than the reading.
_SCORES_AND_CHECK = f"{_SCORES} UNION ALL SELECT NULL, checksum FROM checks {_OF}"
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
    connection: sqlite3.Connection, teacher: int, query: bytes, *, checked: bool
) -> tuple[dict[bytes, float], bool]:
    """Return the scores of a query by document, and whether they are those that were written."""
    rows = connection.execute(_SCORES_AND_CHECK if checked else _SCORES, (teacher, query)).fetchall()
    written = rows.pop()[1] if rows and rows[-1][0] is None else None
    return dict(rows), written is None or written == _checksum(query, rows)


def write_scores_of(connection: sqlite3.Connection, teacher: int, query: bytes, scores: Mapping[bytes, float]) -> None:
    """Write scores of a query and the checksum of all it has; what is there and not as it was written is deleted."""
    stored, sound = read_scores_of(connection, teacher, query, checked=True)
    if not sound:
        connection.execute(f"DELETE FROM scores {_OF}", (teacher, query))
        stored = {}
    connection.executemany(
        "INSERT OR REPLACE INTO scores VALUES (?, ?, ?, ?)",
        [(teacher, query, document, score) for document, score in scores.items()],
    )
    _seal(connection, teacher, query, sorted((stored | dict(scores)).items()))


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
        if found is not None and found[0] != _checksum(query, [row[2:] for row in rows]):
            yield f"the scores of the query with hash {query.hex()}"
    lost = (
        "SELECT query FROM checks WHERE query <> x'' AND NOT EXISTS (SELECT 1 FROM scores "
        "WHERE scores.teacher = checks.teacher AND scores.query = checks.query)"
    )
    for (query,) in connection.execute(lost):
        yield f"the scores of the query with hash {bytes(query).hex()}, of which there are none any more"


def _seal(connection: sqlite3.Connection, teacher: int, query: bytes, rows: Scores) -> None:
    connection.execute("INSERT OR REPLACE INTO checks VALUES (?, ?, ?)", (teacher, query, _checksum(query, rows)))


def _checksum(query: bytes, rows: Scores) -> int:
    """Return a checksum of a query's scores in the order of the documents; -1 for what no score can be."""
    try:
        documents, scores = b"".join([row[0] for row in rows]), array("d", [row[1] for row in rows])
    except TypeError:
        return -1
    return crc32(documents, crc32(scores.tobytes(), crc32(query)))


def remedy(error: sqlite3.DatabaseError) -> str:
    """Return what to do about an error that is no damage."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK) & 0xFF
    return next((text for sign, text in _REMEDIES.items() if sign in (code, *str(error).split())), _ANY_REMEDY)
