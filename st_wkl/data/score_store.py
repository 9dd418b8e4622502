"""Teacher scores on disk: (teacher, query text, document text) → raw score, in SQLite, safe from a killed process."""

from __future__ import annotations

import json
import os
import sqlite3
import time
import warnings
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from st_wkl.data.score_checks import (
    differing,
    has_checks,
    name_teacher,
    prepare_checks,
    read_scores,
    seal,
    write_scores,
)
from st_wkl.data.score_files import BATCH, read_export, write_export
from st_wkl.data.teacher import Pair, TextPairs
from st_wkl.files import cache_folder, expanded, set_aside

Identity = Mapping[str, Any]

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
# What to do, by SQLite's code of an error, or by a word of those that have none.
_AGAIN = "then start again: it continues where it stopped."
_ANY_REMEDY = f"Check free space, permissions and other processes, {_AGAIN}"
_REMEDIES: dict[int | str, str] = {
    "closed": "It was closed, by close() or at the end of its `with` block: keep it open, or open it again.",
    "thread": "Each thread needs a ScoreStore of its own; they may share the file.",
    sqlite3.SQLITE_BUSY: f"Another process is writing. Wait for it or stop it, {_AGAIN}",
    sqlite3.SQLITE_FULL: f"Free some space on the disk, {_AGAIN}",
    sqlite3.SQLITE_READONLY: f"Give yourself the right to write to the file and its folder, {_AGAIN}",
}


@dataclass(frozen=True)
class StoreInfo:
    """What a score store holds; as text a line for the file and one for each teacher."""

    path: str
    bytes: int  # with the part that is not yet merged into the file
    scores: int
    teachers: list[tuple[dict[str, Any], int]]  # the identity of each, and the number of its scores

    def __str__(self) -> str:
        told = (f"  {count:,} of {json.dumps(identity, ensure_ascii=False)}" for identity, count in self.teachers)
        return "\n".join([f"{self.path}: {self.scores:,} scores, {self.bytes / 1e6:,.1f} MB", *told])


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
    is there in full or not at all. Several processes may use one file, on one machine; network drives cannot. A file
    that turns out to be damaged is renamed to `<name>.damaged-<n>` at once, so that it is never read in half.
    The scores of each query have a checksum: those that differ from what was written are not used.

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
        self.path, self._timeout = expanded(path), timeout
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
                        prepare_checks(self._connection)
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
            self._use_write_ahead_log()
            self._connection.execute("PRAGMA synchronous = FULL")

    def __repr__(self) -> str:
        return f"ScoreStore({self.path!r})"

    def _use_write_ahead_log(self) -> None:
        # Readers never wait for the writer. With synchronous=FULL a commit survives a power cut, too: it may be minutes
        # of a teacher's work, beside which the wait for the disk is nothing.
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                if self._one("PRAGMA journal_mode") != "wal":
                    self._connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                # This switch alone does not wait for a lock by itself: two processes that open a new store at the same
                # moment meet here.
                busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
                if not busy or time.monotonic() >= deadline:
                    raise
                time.sleep(0.01)

    def get(self, identity: Identity, pairs: Sequence[Pair]) -> np.ndarray:
        """Return the stored scores of `pairs`, float32 of shape (n,), NaN where there is none or its checksum differs.

        Args:
            identity: `Teacher.identity` of the teacher.
            pairs: n `(query, document)` texts.

        Raises:
            ScoreStoreError: The file is damaged, closed, or stays locked.
        """
        asked = TextPairs.of(pairs)
        scores = np.full(len(asked), np.nan, dtype=np.float32)
        (queries, _), (documents, _) = asked.hashes()
        rows, _ = asked.places()
        wanted = {queries[row]: row for row in np.flatnonzero(np.bincount(rows)).tolist()}
        columns = {document: column for column, document in enumerate(documents)}
        keys, values, damaged = array("q"), array("d"), []
        with self._explained():
            teacher = self._one("SELECT id FROM teachers WHERE identity = ?", _canonical(identity))
            if teacher is None:
                return scores
            checked = has_checks(self._connection)
            for query, there, known, sound in read_scores(self._connection, teacher, wanted, checked=checked):
                if (row := wanted.get(query)) is None:  # not asked for: a bit of its key has changed
                    continue
                if not sound:
                    damaged.append(row)
                    continue
                places = list(map(columns.get, there))
                if None in places:  # scores of other pairs
                    known = tuple(value for value, place in zip(known, places, strict=True) if place is not None)
                keys.extend([row * len(documents) + place for place in places if place is not None])
                values.extend(known)
        if keys:
            found = np.frombuffer(keys, dtype=np.int64)
            order = np.argsort(found)
            at = np.searchsorted(found, asked.keys, sorter=order)
            at = order[np.minimum(at, len(found) - 1)]
            hit = found[at] == asked.keys
            scores[hit] = np.frombuffer(values)[at[hit]]
        if damaged:
            warnings.warn(
                f"{np.isin(rows, damaged).sum():,} of {len(pairs):,} pairs have scores in the score store {self.path} "
                "that are not what was written: a checksum differs. They count as not scored and are computed again. "
                "Something changes bits here: look at the disk and the memory of this machine.",
                stacklevel=2,
            )
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
        values = scores if isinstance(scores, np.ndarray) else np.asarray(scores, dtype=np.float64)
        if len(values) != len(pairs):
            raise ValueError(f"Got {len(values)} scores for {len(pairs)} pairs.")
        if (wrong := np.flatnonzero(~np.isfinite(values))).size:
            query, document = pairs[int(wrong[0])]
            raise ValueError(
                f"The score of query {query[:80]!r} and document {document[:80]!r} is {values[wrong[0]]}. "
                "Only finite scores are stored: a teacher that gives others would ruin the training."
            )
        with self._explained(), self._transaction():
            teacher = self._teacher(_canonical(identity))
            write_scores(self._connection, teacher, TextPairs.of(pairs), values)

    def other_lengths(self, identity: Identity) -> list[dict[str, Any]]:
        """Return the identities of the same teacher with another `max_length`, whose uncut pairs have equal scores."""
        with self._explained():
            stored = [json.loads(text) for (text,) in self._connection.execute("SELECT identity FROM teachers")]
        here = {**identity, "max_length": None}
        return [
            other
            for other in stored
            if isinstance(other.get("max_length"), int)
            and {**other, "max_length": None} == here
            and other != dict(identity)
        ]

    def adopt(self, identity: Identity) -> int:
        """Take over the scores that earlier versions kept for a teacher under a key that left out its settings.

        Only whoever knows that its tokenizer, adapters and settings files are those of that time can say so. Returns
        the number of scores that were taken over; scores that are here already stay as they are.
        """
        former = former_identity(identity)
        with self._explained(), self._transaction():
            if former is None:
                return 0
            teacher = self._teacher(_canonical(identity))
            adopted = self._connection.execute(
                "INSERT OR IGNORE INTO scores SELECT ?, query, document, score FROM scores "
                "JOIN teachers old ON old.id = scores.teacher AND old.identity = ?",
                (teacher, _canonical(former)),
            ).rowcount
            of = "SELECT DISTINCT teacher, query FROM scores WHERE teacher = ?"
            seal(self._connection, self._connection.execute(of, (teacher,)).fetchall())
            return adopted

    def count(self) -> int:
        """Return the number of stored scores, of all teachers."""
        with self._explained():
            return int(self._one("SELECT count(*) FROM scores"))

    def info(self) -> StoreInfo:
        """Return the number of scores of each teacher, and the size of the file."""
        statement = "SELECT identity, (SELECT count(*) FROM scores WHERE teacher = id) FROM teachers ORDER BY id"
        with self._explained():
            teachers = [(json.loads(text), int(count)) for text, count in self._connection.execute(statement)]
        files = (Path(f"{self.path}{end}") for end in ("", "-wal"))
        size = sum(file.stat().st_size for file in files if file.is_file())
        return StoreInfo(self.path, size, sum(count for _, count in teachers), teachers)

    def verify(self) -> int:
        """Read the whole file, check its structure and every entry, and return the number of scores, all sound.

        Raises:
            ScoreStoreError: Something is wrong; the message says what. A file that SQLite calls damaged is set aside,
                see `ScoreStore`.
        """
        with self._explained():
            problems = [row[0] for row in self._connection.execute("PRAGMA integrity_check(3)")]
            if problems != ["ok"]:
                raise ScoreStoreError(self._damaged(" ".join("; ".join(problems).split())))
            wrong = self._one(
                "SELECT count(*) FROM scores WHERE length(query) <> 16 OR length(document) <> 16 "
                "OR typeof(score) <> 'real' OR abs(score) > 3.5e38 OR teacher NOT IN (SELECT id FROM teachers)"
            )
            different = [] if wrong else list(differing(self._connection))
        if wrong:
            raise ScoreStoreError(
                f"{wrong:,} entries of the score store {self.path} are none that this package writes. Another program "
                "has changed the file: move it away, or restore a copy."
            )
        if different:
            raise ScoreStoreError(
                f"In the score store {self.path}, {len(different):,} parts are not what was written (their checksum "
                f"differs): {'; '.join(different[:3])}. Look at the disk and the memory of this machine, and restore a "
                "copy; a build computes the scores of such queries again."
            )
        return self.count()

    def export_parquet(self, path: str | os.PathLike[str], *, show_progress: bool = True) -> int:
        """Write all scores to one parquet file, in one step: `teacher` (JSON), `query`, `document` (hashes), `score`.

        Texts are not in a store, so they are not in the file either: it can be shared where the texts cannot. Returns
        the number of scores.
        """
        statement = "SELECT identity, query, document, score FROM scores JOIN teachers ON teachers.id = teacher"
        with self._explained():
            cursor = self._connection.execute(statement)  # one statement: one state of the store, whoever writes
            batches = iter(lambda: cursor.fetchmany(BATCH), [])
            return write_export(path, batches, total=self.count(), show_progress=show_progress)

    def import_parquet(self, path: str | os.PathLike[str], *, show_progress: bool = True) -> int:
        """Add the scores of an exported file that are not here, all or none, and return how many these are.

        Raises:
            ValueError: The file is damaged, of another kind, or holds a score that is not finite.
        """
        with self._explained(), self._transaction():
            teachers: dict[str, int] = {}
            new = 0
            for rows in read_export(path, show_progress=show_progress):
                for identity in dict.fromkeys(rows["teacher"]):
                    if identity not in teachers:
                        teachers[identity] = self._teacher(_canonical(json.loads(identity)))
                keys = [teachers[identity] for identity in rows["teacher"]]
                new += self._connection.executemany(
                    "INSERT OR IGNORE INTO scores VALUES (?, ?, ?, ?)",
                    zip(keys, rows["query"], rows["document"], rows["score"], strict=True),
                ).rowcount
                seal(self._connection, {*zip(keys, rows["query"], strict=True)})  # not all that others have imported
            return new

    def _teacher(self, identity: str) -> int:
        """Return the number of a teacher, who gets one if there is none, with room for checksums."""
        prepare_checks(self._connection)
        self._connection.execute("INSERT OR IGNORE INTO teachers (identity) VALUES (?)", (identity,))
        teacher = int(self._one("SELECT id FROM teachers WHERE identity = ?", identity))
        name_teacher(self._connection, teacher)
        return teacher

    def close(self) -> None:
        """Close the file. Everything that was put is already safe."""
        with self._explained():
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
        except sqlite3.DatabaseError as error:
            # Errors of the module itself, such as the use of a closed connection, have no code.
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK) & 0xFF
            if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise ScoreStoreError(self._damaged(error)) from error
            raise ScoreStoreError(
                f"The score store {self.path} cannot be used now: {error}. What was stored before is safe. "
                + next((text for sign, text in _REMEDIES.items() if sign in (code, *str(error).split())), _ANY_REMEDY)
            ) from error

    def _damaged(self, error: object) -> str:
        """Set a damaged store of ours aside and say so; leave a stranger's file alone."""
        if not _is_ours(self.path):
            return (
                f"The score store {self.path} is damaged or no score store: {error}. Move the file away (the scores "
                "are then computed again) or give another path."
            )
        self._connection.close()
        kept = set_aside(self.path)
        for end in ("-wal", "-shm"):  # they belong to it, and would be taken for those of the next store
            with suppress(FileNotFoundError):
                os.replace(f"{self.path}{end}", f"{kept}{end}")
        return (
            f"The score store {self.path} is damaged: {error}. It is set aside as {kept}, nothing of it is used. Start "
            "again: the scores are computed anew, unless you put a sound copy in its place or import an export."
        )


def former_identity(identity: Identity) -> dict[str, Any] | None:
    """Return the identity under which earlier versions kept a teacher's scores, None if it is the same today.

    It left out what `settings` holds now, so the scores under it may be those of another tokenizer or adapter.
    """
    former = {
        name: former_identity(value) or value if isinstance(value, Mapping) else value
        for name, value in identity.items()
        if name != "settings" or identity.get("kind") != "cross-encoder"
    }
    return former if former != dict(identity) else None


def _is_ours(path: str) -> bool:
    """Return whether the file's header says that this package made it."""
    try:
        with Path(path).open("rb") as file:
            header = file.read(72)
            return header.startswith(b"SQLite format 3\0") and header[68:72] == _APPLICATION_ID.to_bytes(4, "big")
    except OSError:
        return False


def _canonical(identity: Identity) -> str:
    return json.dumps(dict(identity), sort_keys=True, ensure_ascii=False, allow_nan=False)
