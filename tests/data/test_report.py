"""The teacher report: numbers by hand, a temperature that does what it says, a plot that is there."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from st_wkl.data.dataset import DistillationDataset, features
from st_wkl.data.report import mean_entropy, plot_report, report_on_lists, suggest_temperature, teacher_report

SCORES = [[5.0, 1.0, 0.0], [1.0, 2.0, 3.0], [0.0, 0.0]]
LABELS = [[2, 0, 0], [1, 0, 2], [1, 0]]


def dataset(scores: list[list[float]], labels: list[list[int]]) -> DistillationDataset:
    """Return a dataset of these lists."""
    rows = [
        {"query_id": f"q{n}", "document_ids": [f"d{n}-{i}" for i in range(len(s))], "scores": s, "labels": g}
        for n, (s, g) in enumerate(zip(scores, labels, strict=True))
    ]
    ids = [document_id for row in rows for document_id in row["document_ids"]]
    return DistillationDataset(
        Dataset.from_list(rows, features=features("train")),
        Dataset.from_list([{"query_id": row["query_id"], "text": "text"} for row in rows]),
        Dataset.from_list([{"document_id": document_id, "text": "text"} for document_id in ids]),
        {"teacher": {"model": "some/teacher"}, "collection": {"name": "mine"}},
    )


def test_numbers_by_hand() -> None:
    """Agreement with graded judgements, ties against the teacher."""
    report = report_on_lists(SCORES, LABELS)
    log3 = math.log2(3)
    second = (2 + 1 / 2) / (2 + 1 / log3)  # gains 2, 0, 1 in the teacher's order, ideal 2, 1
    third = 1 / log3  # a tie: the positive counts as second
    assert report.precision_at_1 == pytest.approx(2 / 3)
    assert report.ndcg_at_10 == pytest.approx((1 + second + third) / 3)
    assert report.contradicted_pairs == pytest.approx(1 / 5)
    assert report.mean_margin == pytest.approx((4 + 1 + 0) / 3)
    assert report.mean_spread == pytest.approx((5 + 2 + 0) / 3)
    assert (report.lists, report.constant_lists, report.lowest_score, report.highest_score) == (3, 1, 0.0, 5.0)
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False)) == report.to_dict()
    assert "66.7% of the lists" in str(report)
    assert teacher_report(dataset(SCORES, LABELS)) == report


def test_lists_without_positive_or_negative() -> None:
    """Made by hand or filtered, such lists have scores but nothing to agree with."""
    report = report_on_lists([[1.0, 2.0], [1.0, 2.0]], [[0, 0], [1, 1]])
    assert report.precision_at_1 is None
    assert report.mean_margin is None
    assert "judged" not in str(report)
    with pytest.raises(ValueError, match="no list"):
        report_on_lists([], [])
    with pytest.raises(ValueError, match="temperature must be"):
        report_on_lists(SCORES, LABELS, temperature=0)


def test_entropy_against_the_definition() -> None:
    """−Σ p ln p / ln N, also where a weight underflows."""
    values = np.array([3.0, 1.0, -2.0, 0.5])
    weights = np.exp(values / 0.7) / np.exp(values / 0.7).sum()
    assert mean_entropy([values], 0.7) == pytest.approx(-(weights * np.log(weights)).sum() / math.log(4))
    assert mean_entropy([[1e6, 0.0], [1.0, 1.0], [5.0]]) == pytest.approx(0.5)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_suggested_temperature_has_the_entropy(scale: float) -> None:
    """The suggestion follows the scale of the scores, so that cosines and logits both get one that works."""
    lists = list(np.random.default_rng(0).normal(0, 3, (50, 16)) * scale)
    suggested = suggest_temperature(lists)
    assert suggested is not None
    assert mean_entropy(lists, suggested) == pytest.approx(0.5, abs=0.01)


def test_no_temperature_to_suggest() -> None:
    """Constant lists, and lists with several equal bests, have no temperature of half entropy."""
    assert suggest_temperature([[1.0, 1.0], [2.0]]) is None
    assert suggest_temperature([[1.0, 1.0, 1.0, 0.0]]) is None
    with pytest.raises(ValueError, match="share between 0 and 1"):
        suggest_temperature([[1.0, 0.0]], entropy=1.0)


def test_plot_is_written(tmp_path: Path) -> None:
    """A picture of the right kind, whole, also where every list is constant or nothing is judged."""
    pytest.importorskip("matplotlib")
    for number, labels in enumerate(([[1, 0], [1, 0]], [[0, 0], [0, 0]])):
        path = plot_report(dataset([[2.0, 2.0], [2.0, 2.0]], labels), tmp_path / "new" / f"{number}.png")
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert plot_report(dataset(SCORES, LABELS), tmp_path / "a.svg").read_text(encoding="utf-8").startswith("<?xml")


def plain_report(scores: list[np.ndarray], labels: list[np.ndarray]) -> dict[str, Any]:
    """Return the numbers of the report list by list."""
    margins, ndcg, contradicted, pairs, shares = [], [], 0, 0, []
    for values, gains in zip([one.astype(np.float64) for one in scores], labels, strict=True):
        relevant = gains > 0
        if len(values) > 1:
            shifted = values - values.max()
            weights = np.exp(shifted)
            entropy = math.log(weights.sum()) - float((weights * shifted).sum() / weights.sum())
            shares.append(entropy / math.log(len(values)))
        if relevant.any() and not relevant.all():
            margins.append(values[relevant].max() - values[~relevant].max())
            contradicted += int((values[relevant][:, None] < values[~relevant]).sum())
            pairs += int(relevant.sum() * (~relevant).sum())
            kept = np.maximum(gains, 0)
            order, ideal = np.lexsort((kept, -values))[:10], np.sort(kept)[::-1][:10]
            discounts = 1 / np.log2(np.arange(2, 12))[: len(order)]
            ndcg.append((kept[order] * discounts).sum() / (ideal * discounts).sum())
    return {
        "ndcg_at_10": np.mean(ndcg) if margins else None,
        "mean_margin": np.mean(margins) if margins else None,
        "contradicted_pairs": contradicted / pairs if pairs else None,
        "mean_spread": np.mean([float(one.max()) - float(one.min()) for one in scores]),
        "entropy": np.mean(shares) if shares else 0.0,
    }


@pytest.mark.parametrize("seed", range(8))
def test_reports_are_the_same_to_the_last_bit(seed: int) -> None:
    """The report stands in the dataset's folder, whose bytes must not hang on how lists were put together."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 150 if seed % 2 else 20, 80)
    scores = [(draw.normal(size=length) * draw.choice([0.1, 5])).astype(np.float32).round(1) for length in lengths]
    labels = [draw.choice([0, 0, 0, 1, 2, -1], length) for length in lengths]
    found = report_on_lists(scores, labels).to_dict()
    expected = plain_report(scores, labels)
    assert {name: found[name] for name in expected} == expected
    assert report_on_lists(np.concatenate(scores), np.concatenate(labels), lengths=lengths).to_dict() == found
