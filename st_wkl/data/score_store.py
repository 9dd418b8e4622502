"""Teacher scores on disk: (teacher, query text, document text) → raw score, in SQLite, safe from a killed process."""

from __future__ import annotations

import json
import math
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any, Self

import numpy as np

from st_wkl._files import cache_folder

Identity = Mapping[str, Any]
Pair = tuple[str, str]

_APPLICATION_ID = 0x53574B4C  # "SWKL" in the file's header: tells our files from other programs' databases
_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE teachers (id INTEGER PRIMARY KEY, identity TEXT NOT NULL UNIQUE);
CREATE TABLE scores (
    teacher INTEGER NOT NULL REFERENCES teachers (id),
    query BLOB NOT NULL,
    document BLOB NOT NULL,
    score REAL NOT NULL,
    PRIMARY KEY (teacher, query, document)
) WITHOUT ROWID;
"""


class ScoreStoreError(RuntimeError):
    """The file of a score store cannot be opened, read or written; the message names it and says what to do."""


def default_store_path() -> Path:
    """Return where scores are kept unless told otherwise: `scores.sqlite3` in the user's cache folder of this package.

    That is `$XDG_CACHE_HOME/st_wkl` or `~/.cache/st_wkl`. Scoring is the slow step, so its results outlive a run.
    """
    return cache_folder() / "scores.sqlite3"


class ScoreStore:
    """A file of teacher scores, keyed by everything that decides a score.

    The key is the teacher's identity (see `Teacher.identity`) and the hashes of both texts, so two teachers, revisions
    or lengths never meet, and ids or file names may change. `put` is one transaction: after a crash or `kill -9` a call
    is there in full or not at all. Several processes may use one file, on one machine; network drives cannot.

    Args:
        path: SQLite file, made if absent (with its folder); `":memory:"` keeps the scores in this process only.
        timeout: Seconds to wait while another process writes.

    Raises:
        ScoreStoreError: The file is damaged, is no score store, or cannot be opened.

    Example:
        >>> with ScoreStore(":memory:") as store:
        ...     store.put({"model": "teacher"}, [("a query", "a document")], [3.5])
        ...     store.get({"model": "teacher"}, [("a query", "a document"), ("a query", "another")])
        array([3.5, nan], dtype=float32)
    """

    def __init__(self, path: str | os.PathLike[str], *, timeout: float = 60.0) -> None:
        self.path = str(path)
        try:
            if self.path != ":memory:":
                Path(self.path).parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(self.path, timeout=timeout, isolation_level=None)
        except (OSError, sqlite3.Error) as error:
            raise ScoreStoreError(
                f"The score store {self.path} cannot be opened: {error}. Give a file in a folder that you may write to."
            ) from error
        try:
            self._prepare()
        except BaseException:
            self._connection.close()
            raise

    def _prepare(self) -> None:
        with self._explained():
            application, version = self._header()
            if (application, version) == (0, 0):
                with self._transaction():
                    # Another process may have made the tables while this one waited for the lock.
                    if not self._one("SELECT count(*) FROM sqlite_master"):
                        for statement in _SCHEMA.split(";"):
                            self._connection.execute(statement)
                        self._connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                        self._connection.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
                application, version = self._header()
            if application != _APPLICATION_ID:
                raise ScoreStoreError(
                    f"{self.path} is a database of another program. Give another path for the scores."
                )
            if version != _SCHEMA_VERSION:
                raise ScoreStoreError(
                    f"The score store {self.path} has format {version}, this st_wkl reads {_SCHEMA_VERSION}. "
                    "Upgrade st_wkl or give another path."
                )
            # Write-ahead log: readers never wait for the writer. With synchronous=NORMAL a commit survives a killed
            # process; only a power cut may lose the last commits, never the file.
            if self._one("PRAGMA journal_mode") != "wal":
                self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = NORMAL")

    def get(self, identity: Identity, pairs: Sequence[Pair]) -> np.ndarray:
        """Return the stored scores of `pairs`, float32 of shape (n,), NaN where there is none.

        Args:
            identity: `Teacher.identity` of the teacher.
            pairs: n `(query, document)` texts.

        Raises:
            ScoreStoreError: The file is damaged or stays locked.
        """
        scores = np.full(len(pairs), np.nan, dtype=np.float32)
        # One prepared statement for each pair is the fast way (280,000 pairs/s): SQLite answers
        # `(query, document) IN (VALUES ...)` by walking through all scores of the teacher.
        statement = "SELECT score FROM scores WHERE teacher = ? AND query = ? AND document = ?"
        with self._explained():
            teacher = self._one("SELECT id FROM teachers WHERE identity = ?", _canonical(identity))
            if teacher is not None:
                for place, (query, document) in enumerate(_hashes(pairs)):
                    row = self._connection.execute(statement, (teacher, query, document)).fetchone()
                    if row is not None:
                        scores[place] = row[0]
        return scores

    def put(self, identity: Identity, pairs: Sequence[Pair], scores: Sequence[float] | np.ndarray) -> None:
        """Store the scores of `pairs` in one transaction.

        Args:
            identity: `Teacher.identity` of the teacher.
            pairs: n `(query, document)` texts.
            scores: n finite numbers; what is stored reads back as the same float32.

        Raises:
            ValueError: The counts differ, or a score is NaN or infinite; nothing is stored then.
            ScoreStoreError: The disk is full, the file is read-only, damaged, or stays locked.
        """
        values = [float(score) for score in scores]
        if len(values) != len(pairs):
            raise ValueError(f"Got {len(values)} scores for {len(pairs)} pairs.")
        for (query, document), value in zip(pairs, values, strict=True):
            if not math.isfinite(value):
                raise ValueError(
                    f"The score of query {query[:80]!r} and document {document[:80]!r} is {value}. "
                    "Only finite scores are stored: a teacher that gives others would ruin the training."
                )
        with self._explained(), self._transaction():
            self._connection.execute("INSERT OR IGNORE INTO teachers (identity) VALUES (?)", (_canonical(identity),))
            teacher = self._one("SELECT id FROM teachers WHERE identity = ?", _canonical(identity))
            self._connection.executemany(
                "INSERT OR REPLACE INTO scores VALUES (?, ?, ?, ?)",
                (
                    (teacher, query, document, value)
                    for (query, document), value in zip(_hashes(pairs), values, strict=True)
                ),
            )

    def count(self) -> int:
        """Return the number of stored scores, of all teachers."""
        with self._explained():
            return int(self._one("SELECT count(*) FROM scores"))

    def close(self) -> None:
        """Close the file. Everything that was put is already safe."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _one(self, statement: str, *values: object) -> Any:
        row = self._connection.execute(statement, values).fetchone()
        return row[0] if row else None

    def _header(self) -> tuple[int, int]:
        # Both in one statement: another process may be writing them at this moment.
        statement = "SELECT application_id, user_version FROM pragma_application_id, pragma_user_version"
        application, version = self._connection.execute(statement).fetchone()
        return application, version

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        # IMMEDIATE takes the write lock at the start, where SQLite waits for it; a transaction that reads first and
        # writes later is refused at once when another process has written in between.
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise ScoreStoreError(
                f"The score store {self.path} cannot be used now: {error}. What was stored before is safe. Check free "
                "space, permissions and other processes, then start again: it continues where it stopped."
            ) from error
        except sqlite3.DatabaseError as error:
            raise ScoreStoreError(
                f"The score store {self.path} is damaged or no score store: {error}. Move the file away (the scores "
                "are then computed again) or give another path."
            ) from error


def _canonical(identity: Identity) -> str:
    return json.dumps(dict(identity), sort_keys=True, ensure_ascii=False, allow_nan=False)


def _hashes(pairs: Sequence[Pair]) -> Iterator[tuple[bytes, bytes]]:
    """Yield the 128-bit hashes of both texts of each pair; a text that comes again is hashed once."""
    known: dict[str, bytes] = {}

    def digest(text: str) -> bytes:
        if text not in known:
            known[text] = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        return known[text]

    for query, document in pairs:
        yield digest(query), digest(document)
