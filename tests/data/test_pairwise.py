"""Pairwise teachers and the pairs that they are asked about."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from st_wkl.data.pairwise import (
    CallablePairwiseTeacher,
    CrossEncoderPairwiseTeacher,
    preferences,
    sample_pairs,
)
from st_wkl.data.score_store import ScoreStore
from st_wkl.data.teachers import CallableTeacher

LENGTH = CallableTeacher(lambda query, document: len(document), name="length", version="1")
LISTS = [("q1", ["aaa", "b", "cc", "dddd"]), ("q2", ["one"]), ("q3", []), ("q4", ["zz", "yyy"])]
SCORES = [np.array([3.0, 1.0, 2.0, 4.0]), np.array([0.0]), np.array([]), np.array([2.0, 3.0])]


def test_only_near_neighbours_better_first() -> None:
    """Ranks i < j ≤ i + window, as PairDistill draws them; places are those of the list as given."""
    scores = np.random.default_rng(0).permutation(30).astype(float)
    rank = np.argsort(np.argsort(-scores))
    pairs = sample_pairs(scores, window=5)
    distance = rank[pairs[:, 1]] - rank[pairs[:, 0]]
    assert distance.min() == 1
    assert distance.max() == 5
    assert len(pairs) == len({tuple(pair) for pair in pairs.tolist()}) == 5 * 30 - 15


def test_sampling_is_uniform_repeatable_and_without_repetition() -> None:
    """Each allowed pair comes equally often over many seeds; one seed gives one answer."""
    scores = np.arange(8, dtype=float)
    seen = np.zeros((8, 8))
    for seed in range(600):
        pairs = sample_pairs(scores, window=3, count=6, seed=seed)
        assert len({tuple(pair) for pair in pairs.tolist()}) == 6
        seen[pairs[:, 0], pairs[:, 1]] += 1
    drawn = seen[seen > 0]
    assert len(drawn) == 3 * 8 - 6
    assert abs(drawn / (600 * 6 / 18) - 1).max() < 0.3
    again = [sample_pairs(scores, count=6, seed=1).tolist() for _ in range(2)]
    assert again[0] == again[1] != sample_pairs(scores, count=6, seed=2).tolist()


def test_small_lists_and_bad_input() -> None:
    """One candidate has no pair; more pairs than there are means all of them."""
    assert sample_pairs([1.0]).shape == (0, 2)
    assert sample_pairs([]).shape == (0, 2)
    assert len(sample_pairs([1.0, 1.0, 1.0], count=50)) == 3
    with pytest.raises(ValueError, match="finite scores"):
        sample_pairs([1.0, float("nan")])
    with pytest.raises(ValueError, match="must be positive"):
        sample_pairs([1.0, 2.0], window=0)


def test_preferences_are_long_rows_of_list_and_places() -> None:
    """The shape that `pairwise_kl` takes; the texts behind the places are what the teacher saw."""
    shorter = CallablePairwiseTeacher(lambda q, a, b: float(len(a) < len(b)), name="shorter", version="1")
    pairs, probabilities = preferences(shorter, LISTS, SCORES, window=1, chunk_size=2, show_progress=False)
    assert pairs.tolist() == [[0, 3, 0], [0, 0, 2], [0, 2, 1], [3, 1, 0]]
    assert probabilities.tolist() == [0.0] * 4
    assert probabilities.dtype == np.float32
    none = preferences(shorter, LISTS[1:3], SCORES[1:3], show_progress=False)
    assert [part.shape for part in none] == [(0, 3), (0,)]


def test_pointwise_logits_give_preferences() -> None:
    """P = σ((a − b)/τ), opposite pairs sum to 1, large margins do not overflow; scores are kept."""
    with ScoreStore(":memory:") as store:
        teacher = CrossEncoderPairwiseTeacher(LENGTH, temperature=2.0, store=store)
        found = teacher.prefer(["q"] * 3, ["aaa", "a", "b"], ["a", "aaa", "c" * 100_000])
        assert store.count() == 4
    expected = 1 / (1 + np.exp(-1.0))
    np.testing.assert_allclose(found, [expected, 1 - expected, 0.0], rtol=1e-6)
    assert teacher.identity["temperature"] == 2.0
    assert teacher.identity["teacher"] == LENGTH.identity
    with pytest.raises(ValueError, match="temperature must be positive"):
        CrossEncoderPairwiseTeacher(LENGTH, temperature=0.0)


@pytest.mark.parametrize("answer", [1.5, -0.1, float("nan")])
def test_answers_must_be_probabilities(answer: float) -> None:
    """A logit in place of a probability would make the loss meaningless; the documents are named."""
    teacher = CallablePairwiseTeacher(lambda q, a, b: answer, name="n", version="1")
    with pytest.raises(ValueError, match=r"returned .* for query 'q1' and documents 'dddd' and 'aaa'"):
        preferences(teacher, LISTS, SCORES, show_progress=False)


def test_wrong_counts_are_named() -> None:
    """Too few answers, or lists and scores that do not fit."""

    class Short:
        identity: dict = {"model": "short"}  # noqa: RUF012

        def prefer(self, query: Sequence[str], first: Sequence[str], second: Sequence[str]) -> np.ndarray:
            return np.zeros(1, dtype=np.float32)

    with pytest.raises(ValueError, match=r"shape \(1,\) for 7 triples"):
        preferences(Short(), LISTS, SCORES, show_progress=False)
    with pytest.raises(ValueError, match="List 0 has 4 documents and 1 scores"):
        preferences(Short(), LISTS, SCORES[1:] + SCORES[:1], show_progress=False)
    with pytest.raises(ValueError, match="Got 4 lists and 1"):
        preferences(Short(), LISTS, SCORES[:1], show_progress=False)
