"""Teacher embeddings on disk: (teacher, side, text) → vector, memory-mapped, safe from a killed process."""

from __future__ import annotations

import json
import os
import time
import warnings
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from st_wkl._processes import is_first
from st_wkl.data.embedding_teacher import SIDES, Embedder, EmbeddingTeacher, Side
from st_wkl.files import cache_folder, content_hash, expanded, owned, read_object, set_aside, sync, write_text
from st_wkl.progress import progress

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Stored = Literal["float32", "float16"]

_FORMAT = 1
# Of a text: the hash of its words, and the checksum of its vector.
_ENTRY = np.dtype([("high", "<u8"), ("low", "<u8"), ("check", "<u4")])
# Texts between two commits: what a killed process loses, and what is sorted by length.
_CHUNK = 512
_FITTED = 100_000  # vectors that a projection is fitted on at most: more do not turn it


@dataclass
class _Held:
    """Which rows of a file hold the vectors of which texts, in the order of their hashes."""

    file: Path
    stored: str
    dimension: int
    keys: np.ndarray  # of _ENTRY, sorted by high and low, later rows behind earlier ones
    rows: np.ndarray

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return where entries of these texts stand among `keys`, −1 where there is none."""
        at = np.searchsorted(self.keys["high"], keys["high"], side="right") - 1

        def passed() -> np.ndarray:  # another text, of the same first 64 bits
            there = self.keys[at.clip(0)] if len(self.keys) else np.zeros(len(at), _ENTRY)
            return (at >= 0) & (there["high"] == keys["high"]) & (there["low"] != keys["low"])

        while (step := passed()).any():
            at[step] -= 1
        if len(self.keys):
            at[self.keys["high"][at.clip(0)] != keys["high"]] = -1
        return at

    def read(self, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the vectors of some entries as they are stored, and which of them are what was written."""
        rows = self.rows[at]
        shape = (int(rows.max()) + 1 if len(rows) else 0, self.dimension)
        if not len(rows):
            return np.zeros(shape, self.stored), np.zeros(0, bool)
        vectors = np.memmap(self.file, self.stored, "r", shape=shape)[rows]
        checks = np.fromiter(map(zlib.crc32, vectors), np.uint32, len(vectors))
        return vectors, checks == self.keys["check"][at]


class TeacherVectors:
    """The vectors of the texts of one training, read from the disk as they are asked for.

    `VectorStore.embed` makes it. It holds 28 bytes a text in memory; pickled, it travels to workers as these.

    Args:
        teacher: The teacher's identity.
        name: What people call the teacher.
        held: Where the vectors of each side are.
    """

    def __init__(self, teacher: Mapping[str, Any], name: str, held: dict[Side, _Held]) -> None:
        self.teacher, self.name, self._held = dict(teacher), name, held

    def __len__(self) -> int:
        return sum(len(held.keys) for held in self._held.values())

    def __repr__(self) -> str:
        return f"TeacherVectors({len(self):,} of {self.name}, {self.dimension} dimensions)"

    @property
    def dimension(self) -> int:
        """Numbers in a vector."""
        return next(iter(self._held.values())).dimension

    @property
    def stored(self) -> str:
        """Number type on the disk."""
        return next(iter(self._held.values())).stored

    @property
    def similarity(self) -> str:
        """What the teacher compares vectors by, `"cosine"` unless it says otherwise."""
        return str(self.teacher.get("similarity", "cosine"))

    def run_identity(self) -> dict[str, Any]:
        """Return what of the vectors decides what is learnt, wherever they lie."""
        return {"teacher": self.teacher, "stored": self.stored}

    def find(self, texts: Sequence[str], side: Side) -> np.ndarray:
        """Return where the vectors of n texts are.

        Raises:
            ValueError: A text has none.
        """
        held = self._held.get(side)
        at = np.full(len(texts), -1) if held is None else held.find(_keys(texts))
        if (absent := np.flatnonzero(at < 0)).size:
            raise ValueError(
                f"{self.name} has no vector of the {side} {texts[int(absent[0])][:80]!r}: VectorStore().embed(teacher, "
                f"{{{side!r}: texts}}) makes them, and has to be given every text that is trained on."
            )
        return at

    def of(self, texts: Sequence[str], side: Side) -> np.ndarray:
        """Return the vectors of n texts, float32 `(n, D)`.

        Raises:
            ValueError: A text has none, or one is no longer what was written.
        """
        at, held = self.find(texts, side), self._held[side]
        vectors, sound = held.read(at)
        if not sound.all():
            raise ValueError(
                f"{held.file}: the vector of {texts[int(np.flatnonzero(~sound)[0])][:80]!r} is not what was written (a "
                "checksum differs). Start again: it is embedded anew. Look at the disk and the memory of this machine."
            )
        return vectors.astype(np.float32, copy=False)

    def principal(self, dimension: int) -> np.ndarray:
        """Return the orthonormal directions in which the vectors are longest, in this order, float32 `(D, dimension)`.

        Projected on these, the vectors keep as much of their inner products as `dimension` numbers can (a principal
        component analysis without centring, which cosines would not survive). Of many texts, 100,000 at even distances
        decide; the same texts give the same directions.

        Args:
            dimension: At most that of the vectors.
        """
        moment = np.zeros((self.dimension, self.dimension))
        step = max(len(self) // _FITTED, 1)
        for held in self._held.values():
            places = np.arange(len(held.keys))[::step]  # by hash, so the same wherever they lie
            for begin in range(0, len(places), 8192):
                vectors = held.read(places[begin : begin + 8192])[0].astype(np.float64)
                moment += vectors.T @ vectors
        axes = np.linalg.eigh(moment)[1][:, ::-1][:, :dimension]
        largest = axes[np.abs(axes).argmax(axis=0), np.arange(dimension)]
        return (axes * np.sign(largest)).astype(np.float32)


class VectorStore:
    """A folder of teacher vectors, found by everything that decides a vector.

    The key is the teacher's identity, the side and the text, so two teachers, prompts or lengths never meet. For each
    teacher and side there are `vectors.bin`, one row after another, which `np.memmap` reads, and `texts.bin`, a hash
    of each row's text and a checksum. Vectors are on the disk before their texts are named: killed at any moment, or on
    a full disk, at most the last 512 texts are embedded again. So are vectors that are not what was written, which are
    counted.

    Args:
        folder: Default: `vectors` in the user's cache folder of this package. Vectors outlive a run.

    Raises:
        FileExistsError: When texts are to be embedded by a teacher that another process embeds with.

    Example:
        >>> store = VectorStore("vectors")  # doctest: +SKIP
        >>> vectors = store.embed("packaged:all-MiniLM-L6-v2", {"document": texts})  # doctest: +SKIP
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = cache_folder() / "vectors" if folder is None else Path(expanded(folder))

    def __repr__(self) -> str:
        return f"VectorStore({str(self.folder)!r})"

    def embed(
        self,
        teacher: str | os.PathLike[str] | SentenceTransformer | Embedder,
        texts: Mapping[Side, Iterable[str]],
        *,
        stored: Stored = "float32",
        show_progress: bool = True,
    ) -> TeacherVectors:
        """Embed what has no vector yet, and return the vectors of all.

        Args:
            teacher: A `SentenceTransformer`, its folder, Hub id or `packaged:` name, or an `EmbeddingTeacher`.
            texts: Those of each side, `{"query": [...], "document": [...]}`; unlabelled texts are documents.
            stored: `"float16"` halves the files, and rounds each number by up to .05 %.
            show_progress: Show a bar.

        Raises:
            TypeError: The teacher has no vectors.
            ValueError: A text is null, or the vector of one is NaN, infinite, or of another dimension.
            OSError: The disk is full; what was embedded before is safe.
        """
        if unknown := texts.keys() - {*SIDES}:
            raise ValueError(f"texts has the side {min(unknown)!r}; there are {' and '.join(map(repr, SIDES))}.")
        if stored not in ("float32", "float16"):
            raise ValueError(f"stored is {stored!r}; it has to be 'float32' or 'float16'.")
        asked: Any = teacher if hasattr(teacher, "embed") else EmbeddingTeacher(teacher)  # type: ignore[arg-type]
        different = {side: list(dict.fromkeys(found)) for side, found in texts.items()}
        different = {side: found for side, found in different.items() if found}
        if not different:
            raise ValueError("There are no texts to embed.")
        for side, found in different.items():
            for text in found:
                if not isinstance(text, str):
                    raise ValueError(f"A {side} is {text!r}, not a text: drop it, or give it one.")
        name = str(getattr(asked, "name", None) or asked.identity.get("model", "the teacher"))
        files = {
            side: _File(self._place(asked, side, stored), dict(asked.identity), side, stored) for side in different
        }
        held = {}
        for side, found in different.items():
            held[side] = files[side].filled(asked, found, show_progress=show_progress)
        return TeacherVectors(asked.identity, name, held)

    def _place(self, teacher: Embedder, side: Side, stored: str) -> Path:
        key = {"teacher": dict(teacher.identity), "side": side, "stored": stored}
        return self.folder / content_hash(key, size=16)


class _File:
    """The vectors of one teacher and side."""

    def __init__(self, folder: Path, teacher: dict[str, Any], side: Side, stored: str) -> None:
        self.folder, self.side = folder, side
        self.known = {"format": _FORMAT, "teacher": teacher, "side": side, "stored": stored}
        self.stored = stored
        self.vectors, self.texts = folder / "vectors.bin", folder / "texts.bin"

    def filled(self, teacher: Embedder, texts: list[str], *, show_progress: bool) -> _Held:
        """Embed those texts that have no sound vector, and return where those of all are."""
        keys = _keys(texts)
        while self._missing(keys)[0]:
            if is_first():
                with owned(self.folder):
                    self._embed(teacher, texts, keys, show_progress)
                break
            time.sleep(1)  # until the first process, by which all stand and fall, has done it
        held = self._held()
        at = np.sort(held.find(keys))
        return _Held(held.file, held.stored, held.dimension, held.keys[at], held.rows[at])

    def _missing(self, keys: np.ndarray) -> tuple[list[int], int]:
        """Return the places of texts without a sound vector, and how many of these have a damaged one."""
        held = self._held()
        at = held.find(keys)
        absent = at < 0
        damaged = 0
        there = np.flatnonzero(~absent)
        for begin in range(0, len(there), 8192):
            some = there[begin : begin + 8192]
            wrong = some[~held.read(at[some])[1]]
            damaged += len(wrong)
            absent[wrong] = True
        return np.flatnonzero(absent).tolist(), damaged

    def _embed(self, teacher: Embedder, texts: list[str], keys: np.ndarray, show_progress: bool) -> None:
        missing, damaged = self._missing(keys)
        if damaged:
            warnings.warn(
                f"{damaged:,} vectors in {self.vectors} are not what was written (a checksum differs) and are embedded "
                "again. Look at the disk and the memory of this machine.",
                stacklevel=5,
            )
        self._mend()
        zeros = 0
        bar: dict[str, Any] = {"total": len(texts), "initial": len(texts) - len(missing), "disable": not show_progress}
        with progress(
            desc="Embedding queries" if self.side == "query" else "Embedding documents", unit=" texts", **bar
        ) as shown:
            for begin in range(0, len(missing), _CHUNK):
                chunk = missing[begin : begin + _CHUNK]
                asked = [texts[place] for place in chunk]
                vectors = self._checked(teacher.embed(asked, self.side), asked)
                zeros += int((~vectors.any(axis=1)).sum())
                self._append(keys[chunk], vectors)
                shown.update(len(chunk))
        if zeros:
            warnings.warn(
                f"{zeros:,} {self.side} vectors are zero, of texts of which the teacher knows no word: nothing is "
                "learnt from them.",
                stacklevel=5,
            )

    def _checked(self, found: Any, texts: list[str]) -> np.ndarray:
        """Return vectors as they are stored, or stop at one that cannot be."""
        given = np.asarray(found)
        if given.ndim != 2 or len(given) != len(texts) or not given.shape[1]:
            raise ValueError(f"The teacher gave an array of shape {given.shape} for {len(texts)} texts.")
        held = self._dimension()
        if held not in (0, given.shape[1]):
            raise ValueError(
                f"The teacher gave vectors of {given.shape[1]} dimensions, and those of before have {held}: it is "
                "another one under the same identity. Nothing of it is stored."
            )
        with np.errstate(over="ignore"):
            vectors = np.ascontiguousarray(given, dtype=self.stored)
        if (wrong := np.flatnonzero(~np.isfinite(vectors).all(axis=1))).size:
            sound = bool(np.isfinite(given[wrong[0]]).all())
            why = f"too large for {self.stored}: store float32" if sound else "NaN or infinite: check model and dtype"
            raise ValueError(
                f"The vector of the {self.side} {texts[int(wrong[0])][:80]!r} is {why}. What was embedded before is "
                "safe."
            )
        if not held:
            write_text(
                self.folder / "about.json", json.dumps({**self.known, "dimension": given.shape[1]}, indent=2) + "\n"
            )
        return vectors

    def _dimension(self) -> int:
        """Return the numbers in a vector, 0 where there is none yet."""
        about = read_object(self.folder / "about.json") or {}
        dimension = about.pop("dimension", 0)
        return dimension if isinstance(dimension, int) and about == json.loads(json.dumps(self.known)) else 0

    def _counts(self) -> tuple[int, int]:
        """Return how many texts are named, and how many vectors are whole."""
        width = self._dimension() * np.dtype(self.stored).itemsize
        if not width or not self.texts.is_file() or not self.vectors.is_file():
            return 0, 0
        return self.texts.stat().st_size // _ENTRY.itemsize, self.vectors.stat().st_size // width

    def _held(self) -> _Held:
        count = min(self._counts())
        keys = np.fromfile(self.texts, _ENTRY, count) if count else np.zeros(0, _ENTRY)
        order = np.lexsort((keys["low"], keys["high"]))
        return _Held(self.vectors, self.stored, self._dimension(), keys[order], order)

    def _mend(self) -> None:
        """Cut both files to the vectors that are whole and named, and say what is lost; a stranger's are set aside."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._dimension() and any(self.folder.iterdir()):
            kept = set_aside(self.folder)
            warnings.warn(f"{self.folder} holds no vectors of this teacher; it is set aside as {kept}.", stacklevel=6)
            self.folder.mkdir()
        named, whole = self._counts()
        if named > whole:
            warnings.warn(
                f"{self.vectors} is shorter than when it was written: {named - whole:,} of {named:,} vectors are gone, "
                "and embedded again.",
                stacklevel=6,
            )
        width = self._dimension() * np.dtype(self.stored).itemsize
        for file, size in ((self.texts, _ENTRY.itemsize), (self.vectors, width)):
            file.touch()
            os.truncate(file, min(named, whole) * size)

    def _append(self, keys: np.ndarray, vectors: np.ndarray) -> None:
        """Add vectors, which are on the disk before their texts are named."""
        keys["check"] = np.fromiter(map(zlib.crc32, vectors), np.uint32, len(vectors))
        sizes = {file: file.stat().st_size for file in (self.texts, self.vectors)}
        try:
            for file, data in ((self.vectors, vectors), (self.texts, keys)):
                with file.open("ab") as opened:
                    opened.write(data.tobytes())
                sync(file)
        except OSError as error:
            for file, size in sizes.items():
                os.truncate(file, size)
            raise type(error)(
                error.errno,
                f"{error.strerror}; what was embedded before is safe: free some space and start again",
                str(self.folder),
            ) from error


def _keys(texts: Sequence[str]) -> np.ndarray:
    """Return entries of texts, without checksums."""
    digests = b"".join(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for text in texts)
    keys = np.zeros(len(texts), _ENTRY)
    keys["high"], keys["low"] = np.frombuffer(digests, "<u8").reshape(-1, 2).T
    return keys
