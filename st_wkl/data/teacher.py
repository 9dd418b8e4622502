"""What a teacher is and what it works on: pairs of texts, lists of them, and what counts as a score.

The ground of this room: it imports nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b
from numbers import Real
from typing import Any, Literal, Protocol, overload, runtime_checkable

import numpy as np

Pair = tuple[str, str]
Lists = Sequence[tuple[str, Sequence[str]]]
Engine = Literal["process", "pool", "ray"]

_AT_ONCE = 4_096


class RemoteError(RuntimeError):
    """A server that was asked for scores gives none; the message says what it said, and which pair it was about.

    Attributes:
        status: HTTP status, None where there was no answer.
        answered: Whether it answered, with what is no answer.
    """

    def __init__(self, told: str, *, status: int | None = None, answered: bool = False) -> None:
        super().__init__(told)
        self.status, self.answered = status, answered


class Teacher(Protocol):
    """What the builder needs of a teacher. Any object with these two members is one.

    A third is welcome: `token_lengths(pairs)`, the tokens of each pair before anything is cut, int64 of shape (n,), by
    which `score_pairs` sorts and counts cut pairs (those above `identity["max_length"]`). So is `chunk_pairs`, a
    number: the teacher is then given about so many pairs at once, not by length, but a query's together, as one request
    to a server takes them. Where a score depends on the other candidates of the query, `score` is replaced by
    `score_lists`, see `ListTeacher`.
    """

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides a score, in plain JSON values. Two teachers that score differently never share it."""

    def score(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Return raw scores, float32 of shape (n,), for n `(query, document)` texts, in their order."""


class ListTeacher(Protocol):
    """A teacher whose score of a document depends on the other candidates of the query.

    Its scores are not kept, since a store holds scores of pairs. Those of a teacher that only mixes the scores of other
    ones are: it has `teachers` and `mix(scores)` besides, which gets one list's scores, an array for each teacher. So
    are those of one with `list_parts(lists)`, which yields the place of a list and its scores as they are finished: a
    list's scores stand in the store under keys of the whole list.
    """

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides a score, in plain JSON values."""

    def score_lists(self, lists: Lists, *, show_progress: bool = True) -> Sequence[np.ndarray]:
        """Return for each `(query, documents)` the scores of its documents, float32 of shape (number of documents,)."""


@runtime_checkable
class Mixture(Protocol):
    """The part of a `ListTeacher` that mixes others."""

    teachers: list[Any]

    def mix(self, scores: Sequence[np.ndarray]) -> np.ndarray:
        """Return one list's scores out of those of each teacher."""


class PairwiseTeacher(Protocol):
    """What pairwise distillation needs of a teacher. Any object with these two members is one."""

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides a preference, in plain JSON values."""

    def prefer(self, query: Sequence[str], first: Sequence[str], second: Sequence[str]) -> np.ndarray:
        """Return the probability that `first[i]` is better than `second[i]` for `query[i]`, float32 of shape (n,)."""


class CallableTeacher:
    """Any Python function as a teacher.

    A function has no weights to hash, so its name and version are all that tells its scores from others' in the store.

    Args:
        function: `function(query, document)` of two texts, giving a number; or, with `batched`, `function(pairs)` of a
            list of `(query, document)`, giving one number for each.
        name: Name of the teacher.
        version: Changes whenever the function's answers change; otherwise the old ones come out of the store.
        batched: The function takes a list of pairs.

    Raises:
        ValueError: Name or version is empty, or an answer is no number; the message names the pair.

    Example:
        >>> teacher = CallableTeacher(lambda query, document: document.count(query), name="count", version="1")
        >>> teacher.score([("cat", "cat, cat"), ("cat", "dog")])
        array([2., 0.], dtype=float32)
    """

    def __init__(
        self,
        function: Callable[[str, str], float] | Callable[[list[Pair]], Sequence[float] | np.ndarray],
        *,
        name: str,
        version: str,
        batched: bool = False,
    ) -> None:
        if not callable(function):
            raise TypeError(f"function must be callable, got {type(function).__name__}.")
        if not name or not version:
            raise ValueError(f"A function needs a name and a version to be known by, got {name!r} and {version!r}.")
        self._function: Callable[..., Any] = function
        self._name, self._version, self._batched = name, str(version), batched

    def __repr__(self) -> str:
        return f"CallableTeacher(name={self._name!r}, version={self._version!r})"

    @property
    def identity(self) -> dict[str, Any]:
        """Name and version."""
        return {"kind": "callable", "model": self._name, "revision": self._version}

    def score(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Ask the function about each pair."""
        if self._batched:
            return as_scores(self._function(list(pairs)), pairs)
        scores = np.empty(len(pairs), dtype=np.float32)
        for place, (query, document) in enumerate(pairs):
            answer = self._function(query, document)
            try:
                if isinstance(answer, str | bytes):
                    raise TypeError("text")
                scores[place] = float(answer)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"The teacher {self._name!r} returned {answer!r} for query {query[:80]!r} and document "
                    f"{document[:80]!r}; expected a number."
                ) from error
        return scores


class TextPairs(Sequence[Pair]):
    """Many pairs of few texts: each text once, and 8 bytes for a pair, where a list of tuples takes 64 and more.

    Args:
        queries: Q different texts.
        documents: D different texts.
        keys: int64 of shape (n,), `place of the query * D + place of the document` of each pair.
    """

    def __init__(self, queries: Sequence[str], documents: Sequence[str], keys: np.ndarray) -> None:
        self.queries, self.documents, self.keys = queries, documents, keys
        self._hashes: list[tuple[list[bytes], np.ndarray]] = []

    def __repr__(self) -> str:
        return f"TextPairs({len(self):,} pairs of {len(self.queries):,} queries and {len(self.documents):,} documents)"

    @classmethod
    def at(
        cls, queries: Sequence[str], documents: Sequence[str], query_places: np.ndarray, document_places: np.ndarray
    ) -> TextPairs:
        """Return the pairs `(queries[query_places[i]], documents[document_places[i]])`; texts may repeat.

        Raises:
            TypeError: Something that is used is no text.
        """
        sides = []
        for texts, places in ((queries, query_places), (documents, document_places)):
            places = np.asarray(places, dtype=np.int64)
            new = np.zeros(len(texts), dtype=np.int64)
            index: dict[str, int] = {}
            for place in np.flatnonzero(np.bincount(places, minlength=len(texts))).tolist():
                if not isinstance(texts[place], str):
                    raise TypeError(f"Text {place} is {texts[place]!r}; expected two texts (query, document).")
                new[place] = index.setdefault(texts[place], len(index))
            sides.append((list(index), new[places]))
        return cls(sides[0][0], sides[1][0], sides[0][1] * len(sides[1][0]) + sides[1][1])

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> TextPairs:
        """Return the same pairs in this form.

        Raises:
            TypeError: A pair is not two texts.
        """
        if isinstance(pairs, TextPairs):
            return pairs
        for place, pair in enumerate(pairs):
            if len(pair) != 2 or not isinstance(pair[0], str) or not isinstance(pair[1], str):
                raise TypeError(f"Pair {place} is {pair!r}; expected two texts (query, document).")
        queries: dict[str, int] = {}
        documents: dict[str, int] = {}
        rows = _numbered((query for query, _ in pairs), queries, len(pairs))
        columns = _numbered((document for _, document in pairs), documents, len(pairs))
        rows *= len(documents)
        rows += columns
        return cls(list(queries), list(documents), rows)

    @classmethod
    def different(cls, pairs: Sequence[Pair]) -> tuple[TextPairs, np.ndarray]:
        """Return the different pairs in the order of `sorted(set(pairs))`, and where each of `pairs` is among them.

        Raises:
            TypeError: A pair is not two texts.

        Example:
            >>> different, places = TextPairs.different([("b", "x"), ("a", "y"), ("b", "x")])
            >>> list(different), places.tolist()
            ([('a', 'y'), ('b', 'x')], [1, 0, 1])
        """
        given = cls.of(pairs)
        (queries, rows), (documents, columns) = _in_order(given.queries), _in_order(given.documents)
        keys, others = np.divmod(given.keys, max(1, len(documents)))
        keys = rows[keys]
        keys *= len(documents)
        keys += columns[others]
        del others
        found = np.sort(keys)  # np.unique makes a table of hashes, which takes five times as long
        found = found[np.diff(found, prepend=-1) > 0]
        return cls(queries, documents, found), np.searchsorted(found, keys)

    def take(self, places: np.ndarray) -> TextPairs:
        """Return the pairs at `places`, in their order."""
        part = TextPairs(self.queries, self.documents, self.keys[places])
        part._hashes = self._hashes  # one list: what is hashed for one part is hashed for all
        return part

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Return for each pair the places of its query and of its document."""
        rows, columns = np.divmod(self.keys, max(1, len(self.documents)))
        return rows, columns

    def sizes(self, measure: Callable[[Sequence[str]], np.ndarray]) -> np.ndarray:
        """Return for each pair the sum of what `measure` says of its two texts; each text is measured once."""
        rows, columns = self.places()
        total: np.ndarray = measure(self.queries)[rows]
        total += measure(self.documents)[columns]
        return total

    def hashes(self) -> list[tuple[list[bytes], np.ndarray]]:
        """Return the 128-bit hashes of the queries and of the documents, and the rank of each hash."""
        if not self._hashes:
            for texts in (self.queries, self.documents):
                hashes = [text_key(text) for text in texts]
                ranks = np.empty(len(hashes), dtype=np.int64)
                ranks[sorted(range(len(hashes)), key=hashes.__getitem__)] = np.arange(len(hashes))
                self._hashes.append((hashes, ranks))
        return self._hashes

    def __len__(self) -> int:
        return len(self.keys)

    @overload
    def __getitem__(self, place: int) -> Pair: ...
    @overload
    def __getitem__(self, place: slice) -> list[Pair]: ...
    def __getitem__(self, place: int | slice) -> Pair | list[Pair]:
        if isinstance(place, slice):
            return list(TextPairs(self.queries, self.documents, self.keys[place]))
        query, document = divmod(int(self.keys[place]), len(self.documents))
        return self.queries[query], self.documents[document]

    def __iter__(self) -> Iterator[Pair]:
        for start in range(0, len(self.keys), _AT_ONCE):
            queries, documents = np.divmod(self.keys[start : start + _AT_ONCE], max(1, len(self.documents)))
            for query, document in zip(queries.tolist(), documents.tolist(), strict=True):
                yield self.queries[query], self.documents[document]


def from_parts(parts: Iterable[tuple[np.ndarray, np.ndarray]], count: int) -> np.ndarray:
    """Return answers that come as `(places, values)`, float32 of shape (count,)."""
    found = np.empty(count, dtype=np.float32)
    for places, values in parts:
        found[places] = values
    return found


def text_key(text: str) -> bytes:
    """Return the 128-bit hash by which the store knows a text."""
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _numbered(texts: Iterable[str], known: dict[str, int], count: int) -> np.ndarray:
    return np.fromiter((known.setdefault(text, len(known)) for text in texts), dtype=np.int64, count=count)


def _in_order(texts: Sequence[str]) -> tuple[list[str], np.ndarray]:
    order = sorted(range(len(texts)), key=texts.__getitem__)
    ranks = np.empty(len(texts), dtype=np.int64)
    ranks[order] = np.arange(len(texts))
    return [texts[place] for place in order], ranks


def as_scores(output: Any, pairs: Sequence[Pair]) -> np.ndarray:
    """Return what a teacher gave for `pairs` as float32 of shape (n,), the one place that decides what a score is.

    Raises:
        ValueError: It is no list of numbers, or one of them is masked, not finite, or a mask value; the message names
            the pair.
    """
    numbers = as_numbers(output, pairs)
    if numbers.shape != (len(pairs),):
        raise ValueError(
            f"The teacher returned scores of shape {numbers.shape} for {len(pairs)} pairs, the first of which is "
            f"{shown(pairs[0])}. It must return one number for each pair."
        )
    wrong = np.flatnonzero(~np.isfinite(numbers))
    if wrong.size:
        raise ValueError(
            f"The teacher returned {numbers[wrong[0]]} for {shown(pairs[wrong[0]])}, and {wrong.size - 1} more scores "
            "that are not finite. Half precision may overflow: load the teacher in float32 or bfloat16, or remove the "
            "document. The scores up to here are kept."
        )
    check_bounds(numbers, pairs)
    return numbers.astype(np.float32)


def check_bounds(numbers: np.ndarray, pairs: Sequence[Pair]) -> None:
    """Stop at what no loss would take for a score; NaN, which is none yet, may be there.

    Raises:
        ValueError: With value and pair.
    """
    from st_wkl.functional._scores import (  # with torch, which a look at a store can do without
        LARGEST_SCORE,
        MASK_VALUES,
    )

    wrong = np.flatnonzero((np.abs(numbers) > LARGEST_SCORE) | np.isin(numbers, MASK_VALUES))
    if wrong.size:
        raise ValueError(
            f"The teacher's score of {shown(pairs[int(wrong[0])])} is {float(numbers[wrong[0]]):.12g}, and "
            f"{wrong.size - 1} more are like it. Beyond {LARGEST_SCORE:g}, and at "
            f"{' and '.join(f'{value:g}' for value in MASK_VALUES)}, a number is taken for a mask, and float32 would "
            "round it: return raw scores of a smaller scale, or leave the pair out."
        )


def as_numbers(output: Any, pairs: Sequence[Pair]) -> np.ndarray:
    """Return a teacher's answers as float64, of whatever shape they have.

    Raises:
        ValueError: They are no numbers (text, dates, complex ones, objects), or some are masked.
    """
    if hasattr(output, "detach"):  # a tensor of any device, and of types that numpy lacks
        output = output.detach().cpu()
        output = (output if output.is_complex() else output.double()).numpy()
    elif isinstance(output, list | tuple):
        output = [one.item() if getattr(one, "ndim", None) == 0 and hasattr(one, "item") else one for one in output]
    try:
        values = np.ma.asanyarray(output)
    except ValueError:  # rows of different lengths
        values = np.ma.asarray(np.array(output, dtype=object))
    plain = np.asarray(values)
    bad = np.ma.getmaskarray(values)
    if plain.dtype.kind == "O":
        bad = bad | np.array([not isinstance(one, Real) for one in plain.flat], bool).reshape(plain.shape)
    elif plain.dtype.kind not in "fiub":
        bad = np.ones(plain.shape, bool)
    if plain.size and bad.any():
        place = int(np.flatnonzero(bad)[0])
        value = "a masked value" if np.ma.getmaskarray(values).flat[place] else f"{plain.flat[place]!r}"
        about = shown(pairs[place]) if plain.shape == (len(pairs),) else f"{len(pairs)} pairs"
        raise ValueError(
            f"The teacher returned {value} ({plain.dtype if plain.ndim else type(output).__name__}) for {about}. It "
            "must return one number for each pair, as a list, an array or a tensor."
        )
    return plain.astype(np.float64)


def shown(pair: Pair) -> str:
    """Name a pair in a message: the beginnings of both texts, and the document's length."""
    return f"query {pair[0][:80]!r} and document {pair[1][:80]!r} ({len(pair[1]):,} characters)"
