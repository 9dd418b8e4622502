"""Candidates that repeat a positive or another candidate: all of a build at once, each text read once."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

from st_wkl.text import jaccard, plain_text, text_words, words

COPY, NEAR, REPEATED = 1, 2, 3
_BITS = 256
_TEXTS_AT_ONCE = 1_024
_AT_ONCE = 1 << 19  # comparisons, each of 64 bytes


class Texts:
    """What decides whether two texts are copies, 52 bytes for each text.

    Equal texts are known by a hash of `plain_text`. Whether two sets of words are nearly equal is first asked of 256
    bits, one set for each word: sets differ in as many words as their bits do, or more.

    Args:
        texts: The texts, each read once.
        near: Jaccard coefficient of near copies; `None` if only equal texts matter.
    """

    def __init__(self, texts: Sequence[str], near: float | None) -> None:
        self.texts, self.near = texts, near
        self.plain = np.empty(len(texts), np.int64)
        self.sizes = np.zeros(len(texts), np.int32)
        self.bits = np.zeros((len(texts), _BITS // 64), np.uint64)
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            part = slice(start, start + _TEXTS_AT_ONCE)
            found = array("q")
            for place, text in enumerate(texts[part], start):
                plain = plain_text(text)
                self.plain[place] = hash(plain)
                if near is not None:
                    unique = {*(words(plain) or plain.split())}
                    self.sizes[place] = len(unique)
                    found.extend(map(hash, unique))
            marks = np.zeros((len(self.sizes[part]), _BITS), bool)
            marks[np.repeat(np.arange(len(marks)), self.sizes[part]), np.array(found, np.int64) % _BITS] = True
            self.bits[part] = np.packbits(marks, axis=1).view(np.uint64)
        self._sets: dict[int, frozenset[str]] = {}

    def are_near(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Return which pairs of texts, given by their places, have nearly the same words."""
        near = np.zeros(len(first), bool)
        if self.near is None:
            return near
        # |A Δ B| ≤ (|A| + |B|) (1 − t) / (1 + t) where |A ∩ B| / |A ∪ B| ≥ t; the sizes alone rule most pairs out.
        sizes = self.sizes[first], self.sizes[second]
        most = (sizes[0] + sizes[1]) * (1 - self.near) / (1 + self.near) + 1e-6
        left = np.flatnonzero(np.abs(sizes[0] - sizes[1]) <= most)
        differing = np.bitwise_count(self.bits[first[left]] ^ self.bits[second[left]]).sum(axis=1)
        for place in left[differing <= most[left]].tolist():
            near[place] = jaccard(self._set(int(first[place])), self._set(int(second[place]))) >= self.near
        return near

    def _set(self, place: int) -> frozenset[str]:
        if place not in self._sets:
            self._sets[place] = frozenset(text_words(self.texts[place]))
        return self._sets[place]


def find_copies(
    texts: Texts, candidates: np.ndarray, sizes: np.ndarray, positives: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """Say which candidates repeat a positive of their query or one of its candidates before.

    Args:
        texts: All texts.
        candidates: Places of the candidates' texts, query after query, best first.
        sizes: How many of them each query has.
        positives: Places of the positives' texts, query after query.
        counts: How many of them each query has.

    Returns:
        int8, for each candidate `COPY` of a positive, `NEAR` copy of one, `REPEATED` candidate, or 0.
    """
    kind = np.zeros(len(candidates), np.int8)
    rows = np.repeat(np.arange(len(sizes)), sizes)
    keys = texts.plain[candidates]
    order = np.lexsort((np.arange(len(keys)), keys, rows))
    again = (np.diff(rows[order]) == 0) & (np.diff(keys[order]) == 0)
    kind[order[1:][again]] = REPEATED
    begins, of_each = np.cumsum(counts) - counts, counts[rows]
    ends = np.cumsum(of_each)
    start = 0
    while start < len(candidates):
        stop = max(start + 1, int(np.searchsorted(ends, (ends[start - 1] if start else 0) + _AT_ONCE, side="right")))
        here = of_each[start:stop]
        place = np.repeat(np.arange(start, stop), here)
        within = np.arange(len(place)) - np.repeat(np.cumsum(here) - here, here)
        others = positives[begins[rows[place]] + within]
        equal = keys[place] == texts.plain[others]
        kind[place[equal]] = COPY
        left = np.flatnonzero(kind[place] == 0)
        kind[place[left][texts.are_near(candidates[place[left]], others[left])]] = NEAR
        start = stop
    return kind
