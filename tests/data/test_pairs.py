"""Pairs as places of texts are the pairs that they stand for."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from st_wkl.data.score_store import ScoreStore
from st_wkl.data.scoring import score_pairs
from st_wkl.data.teacher import TextPairs


class Lengths:
    """A teacher that costs nothing."""

    @property
    def identity(self) -> dict[str, str]:
        """Name it."""
        return {"model": "lengths"}

    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Score by length."""
        return np.array([len(document) for _, document in pairs], dtype=np.float32)


PAIRS = st.lists(st.tuples(st.text(max_size=3), st.text(max_size=3)), max_size=40)


@given(PAIRS, st.randoms(use_true_random=False))
def test_same_as_a_sorted_set(pairs: list[tuple[str, str]], chance: object) -> None:
    """Chunks are cut from this order: were it another one, old stores would be resumed in other batches."""
    different, places = TextPairs.different(pairs)
    expected = sorted(set(pairs))
    assert list(different) == expected
    assert [different[place] for place in range(len(different))] == expected
    assert [different[place] for place in places] == pairs
    assert different[1:5] == expected[1:5]
    order = list(range(len(expected)))
    chance.shuffle(order)  # type: ignore[attr-defined]
    assert list(different.take(np.array(order, dtype=np.int64))) == [expected[place] for place in order]


@given(PAIRS)
def test_places_of_texts_are_the_pairs(pairs: list[tuple[str, str]]) -> None:
    """Whoever holds texts once points at them; a text that stands there twice must not become two in the store."""
    queries, documents = ["unused", *(query for query, _ in pairs)], [document for _, document in pairs]
    places = np.arange(len(pairs))
    found = TextPairs.at(queries, documents, places + 1, places)
    assert list(found) == pairs
    assert len(set(found.queries)) == len(found.queries) <= len(pairs)
    assert list(TextPairs.different(found)[0]) == sorted(set(pairs))
    with ScoreStore(":memory:") as store:
        store.put({"model": "t"}, found, [float(len(query)) for query, _ in pairs])
        np.testing.assert_array_equal(store.get({"model": "t"}, pairs), [len(query) for query, _ in pairs])


def test_what_is_no_pair() -> None:
    """Null text reaches here when a collection was made by hand; the place tells which."""
    with pytest.raises(TypeError, match=r"Pair 1 is \('a', None\); expected two texts"):
        TextPairs.different([("a", "b"), ("a", None)])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="Text 1 is None; expected two texts"):
        TextPairs.at(["a"], ["b", None], np.array([0]), np.array([1]))  # type: ignore[list-item]


def test_memory_per_pair(tmp_path: Path) -> None:
    """Ten million pairs of a week's scoring must fit: beside the caller's list a pair may cost a few numbers only."""
    documents = [f"document {place}" for place in range(2_000)]

    def peak(count: int) -> int:
        pairs = [(f"query {place % 97}", documents[place // 97]) for place in range(count)]
        with ScoreStore(tmp_path / f"{count}") as store:
            tracemalloc.start()
            score_pairs(Lengths(), pairs, store=store, show_progress=False)
            highest = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        return highest

    few, many = peak(10_000), peak(60_000)
    assert (many - few) / 50_000 < 90
