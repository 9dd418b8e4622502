"""Selection: what is filtered, chosen and left out, against plain loops and by hand."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest

from st_wkl.data.selection import Selection, choose, duplicates, false_negatives
from st_wkl.text import jaccard, plain_text, text_words


def sigmoid(value: float) -> float:
    """Return the logistic function."""
    return 1 / (1 + math.exp(-value))


@pytest.mark.parametrize("reference", ["best", "worst"])
@pytest.mark.parametrize(("relative", "absolute"), [(0.95, None), (None, 3.0), (0.9, 1.0), (1.0, 0.0)])
def test_false_negatives_against_a_loop(reference: Any, relative: float | None, absolute: float | None) -> None:
    """The definition, one candidate at a time."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        scores, positives = rng.normal(0, 4, 12), rng.normal(1, 4, 3)
        limit = max(positives) if reference == "best" else min(positives)
        expected = [
            (absolute is not None and score > limit - absolute)
            or (relative is not None and sigmoid(score) >= relative * sigmoid(limit))
            for score in scores
        ]
        found = false_negatives(
            scores, positives, relative_margin=relative, absolute_margin=absolute, reference=reference
        )
        assert found.tolist() == expected


def test_relative_margins_of_negative_logits() -> None:
    """0.95 · (−4) lies above −4: on logits the filter would keep what is better than the positive."""
    assert false_negatives([-3.9, -4.0, -4.02, -4.2], [-4.0], relative_margin=0.95).tolist() == [
        True,
        True,
        True,
        False,
    ]
    assert false_negatives([-900.0, -901.0], [-900.0], relative_margin=0.95).tolist() == [True, False]
    assert false_negatives([0.96, 0.94], [1.0], relative_margin=0.95, probabilities=True).tolist() == [True, False]


def test_quantiles_take_one_of_each_stratum() -> None:
    """Easy and hard candidates in equal parts; ties and short pools included."""
    scores = np.random.default_rng(1).permutation(20).astype(float)
    chosen = choose(20, 5, "quantiles", scores=scores, seed=3, key="q")
    assert sorted(int(scores[place] // 4) for place in chosen) == [0, 1, 2, 3, 4]
    assert sorted(choose(3, 5, "quantiles", scores=[1.0, 1.0, 1.0])) == [0, 1, 2]
    assert choose(0, 5, "quantiles", scores=[]) == []
    with pytest.raises(ValueError, match="score of each of the 3 candidates"):
        choose(3, 2, "quantiles")


def test_random_choice() -> None:
    """Every candidate has the same chance, none comes twice, and query and seed decide."""
    counts = np.zeros(10)
    for number in range(2000):
        chosen = choose(10, 3, "random", key=str(number))
        assert len(set(chosen)) == 3
        counts[chosen] += 1
    assert abs(counts - 600).max() < 90
    assert choose(50, 9, "random", seed=1, key="q") == choose(50, 9, "random", seed=1, key="q")
    assert choose(50, 9, "random", seed=1, key="q") != choose(50, 9, "random", seed=2, key="q")


def test_duplicates_are_told_apart() -> None:
    """Copies, near copies and repetitions are three counts; what differs in a word of few is a document of its own."""
    positives = {"p": "one two three four five six seven eight nine ten"}
    candidates = {
        "copy": "ONE two three four five six seven eight nine  ten",
        "near": "one two three four five six seven eight nine",
        "other": "one two three four five",
        "again": "One two three four five",
        "none": "?!",
    }
    assert duplicates(candidates, positives) == (["copy"], ["near"], ["again"])
    assert duplicates(candidates, positives, None) == (["copy"], [], ["again"])
    assert duplicates({"a": "", "b": "x"}, {"p": ""}) == (["a"], [], [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"choice": "best"}, "choice must be one of"),
        ({"reference": "first"}, "reference must be one of"),
        ({"label_correction": "flip"}, "label_correction must be one of"),
        ({"pool_size": 0}, "pool_size must be 1 or more"),
        ({"max_positives": 0}, "max_positives must be 1 or more"),
        ({"relative_margin": 1.5}, "relative_margin is a share"),
        ({"absolute_margin": -1.0}, "absolute_margin is a finite distance"),
        ({"near_duplicates": 0.0}, "near_duplicates is a Jaccard"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    """Before anything is mined or scored."""
    with pytest.raises(ValueError, match=message):
        Selection(**options)


def test_no_positive_is_an_error() -> None:
    """Nothing can be compared with nothing."""
    with pytest.raises(ValueError, match="no positive"):
        false_negatives([1.0], [], absolute_margin=1.0)


def test_pool_sizes() -> None:
    """Scoring is what costs: the pool is larger than the list only where something is chosen from it."""
    assert Selection().pool(15) == 15
    assert Selection(absolute_margin=1.0).pool(15) == 60
    assert Selection(choice="random").pool(15) == 60
    assert Selection(choice="random", pool_size=20).pool(15) == 20
    assert Selection(pool_size=3).pool(15) == 15


@pytest.mark.parametrize("near", [0.9, 0.6, 1.0, None])
def test_copies_are_those_that_a_comparison_of_all_words_finds(near: float | None) -> None:
    """Bits rule out most pairs of texts; one that they ruled out wrongly would be a negative that is an answer."""
    draw = random.Random(str(near))
    texts = ["", " ", "?!", "検索エンジン"]
    for _ in range(150):
        words = [f"w{draw.randint(0, 30)}" for _ in range(draw.randint(1, 25))]
        other = draw.choice(texts).split()
        texts.append(
            " ".join(draw.choice([words, other, [*other, "more"], [*reversed(other)], [*other, "."], other[1:]]))
        )
        texts.append(draw.choice(texts).upper())
    documents = {f"d{place}": text for place, text in enumerate(texts)}
    for _ in range(20):
        keys = draw.sample(list(documents), 40)
        positives, candidates = ({key: documents[key] for key in part} for part in (keys[:4], keys[4:]))
        expected: tuple[list[str], list[str], list[str]] = ([], [], [])
        seen: set[str] = set()
        for key, text in candidates.items():
            sets = [frozenset(text_words(one)) for one in positives.values()]
            if plain_text(text) in map(plain_text, positives.values()):
                expected[0].append(key)
            elif plain_text(text) in seen:
                expected[2].append(key)
            elif near is not None and any(jaccard(frozenset(text_words(text)), one) >= near for one in sets):
                expected[1].append(key)
            seen.add(plain_text(text))
        assert duplicates(candidates, positives, near) == expected
