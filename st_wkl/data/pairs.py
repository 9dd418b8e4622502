"""Many pairs of few texts, in little memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import overload

import numpy as np

Pair = tuple[str, str]

_AT_ONCE = 4_096


class TextPairs(Sequence[Pair]):
    """Text pairs of which only the places of their texts are kept: 8 bytes for a pair, where a list takes 64 and more.

    Args:
        queries: Q different texts.
        documents: D different texts.
        keys: int64 of shape (n,), `place of the query * D + place of the document` of each pair.
    """

    def __init__(self, queries: Sequence[str], documents: Sequence[str], keys: np.ndarray) -> None:
        self.queries, self.documents, self.keys = queries, documents, keys

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
        for place, pair in enumerate(pairs):
            if len(pair) != 2 or not isinstance(pair[0], str) or not isinstance(pair[1], str):
                raise TypeError(f"Pair {place} is {pair!r}; expected two texts (query, document).")
        queries, documents = sorted({query for query, _ in pairs}), sorted({document for _, document in pairs})
        rows = {text: place * len(documents) for place, text in enumerate(queries)}
        columns = {text: place for place, text in enumerate(documents)}
        keys = np.fromiter(
            (rows[query] + columns[document] for query, document in pairs), dtype=np.int64, count=len(pairs)
        )
        different = np.unique(keys)
        return cls(queries, documents, different), np.searchsorted(different, keys)

    def take(self, places: np.ndarray) -> TextPairs:
        """Return the pairs at `places`, in their order."""
        return TextPairs(self.queries, self.documents, self.keys[places])

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


def pair_hashes(pairs: Sequence[Pair]) -> Iterator[tuple[bytes, bytes]]:
    """Yield the 128-bit hashes of both texts of each pair; a text that comes again is hashed once."""
    known: dict[str, bytes] = {}

    def digest(text: str) -> bytes:
        if (found := known.get(text)) is None:
            found = known[text] = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        return found

    for query, document in pairs:
        yield digest(query), digest(document)
