"""Preferences from the builder through the store, the disk and the Hub's layout to the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, load_dataset
from sentence_transformers import SentenceTransformerTrainingArguments

from st_wkl.data.collator import ListwiseCollator
from st_wkl.data.dataset import DistillationDataset, features
from st_wkl.data.pairwise import CallablePairwiseTeacher, CrossEncoderPairwiseTeacher, preferences
from st_wkl.data.score_store import ScoreStore
from st_wkl.losses import PairDistillLoss
from st_wkl.training import distill
from tests.data.test_builder import DOCUMENTS, HAND, LengthTeacher, build
from tests.helpers.students import features_and_labels, gradients, make_student

SHORTER = CallablePairwiseTeacher(lambda q, a, b: 0.9 if len(a) < len(b) else 0.2, name="shorter", version="1")


class CountingTeacher:
    """A pairwise teacher that counts what it is asked, and may die in the middle."""

    def __init__(self, dies_after: int | None = None) -> None:
        self.asked: list[tuple[str, str, str]] = []
        self.dies_after = dies_after

    @property
    def identity(self) -> dict[str, Any]:
        """Name it."""
        return {"model": "counting"}

    def prefer(self, query: Sequence[str], first: Sequence[str], second: Sequence[str]) -> np.ndarray:
        """Prefer the shorter document."""
        if self.dies_after is not None and len(self.asked) >= self.dies_after:
            raise KeyboardInterrupt
        self.asked += zip(query, first, second, strict=True)
        return np.array([0.9 if len(a) < len(b) else 0.2 for a, b in zip(first, second, strict=True)], np.float32)


def test_the_builder_asks_about_neighbours_of_the_pointwise_ranking() -> None:
    """A pair of places means nothing unless it points at the documents that the teacher saw, in that direction."""
    dataset = build(query_ids=["q1"], candidates=HAND, num_negatives=3, pairwise=SHORTER)
    row = dataset.train[0]
    for pair in row["preferences"]:
        first, second = (DOCUMENTS[row["document_ids"][pair[name]]] for name in ("first", "second"))
        assert row["scores"][pair["first"]] >= row["scores"][pair["second"]], "asked in the pointwise order"
        assert pair["probability"] == pytest.approx(0.9 if len(first) < len(second) else 0.2)
    documents = len(row["document_ids"])
    assert len(row["preferences"]) == sum(min(5, documents - 1 - rank) for rank in range(documents))
    said = dataset.provenance["preferences"]
    assert (said["pairs"], said["rows_without_pairs"], said["teacher"]["model"]) == (15, 0, "shorter")
    few = build(query_ids=["q1"], candidates=HAND, num_negatives=3, pairwise=SHORTER, pairs_per_query=4)
    assert len(few.train[0]["preferences"]) == 4
    assert "preferences" not in build(candidates=HAND).train.column_names


def test_answers_are_kept_and_never_asked_again(tmp_path: Path) -> None:
    """A pairwise teacher is the slowest of all: what it said before a crash must survive, under its own name."""
    lists = [(f"q{n}", [f"{n}" * k for k in (1, 3, 5)]) for n in range(6)]
    scores = [np.array([1.0, 2.0, 3.0])] * 6
    with ScoreStore(tmp_path / "scores.sqlite3") as store:
        dying = CountingTeacher(dies_after=8)
        with pytest.raises(KeyboardInterrupt):
            preferences(dying, lists, scores, store=store, chunk_size=4, show_progress=False)
        teacher = CountingTeacher()
        found = preferences(teacher, lists, scores, store=store, chunk_size=4, show_progress=False)
        assert not set(dying.asked) & set(teacher.asked)
        assert len(dying.asked) + len(teacher.asked) == 18
        again = preferences(teacher, lists, scores, store=store, show_progress=False)
        assert np.array_equal(found[1], again[1])
        assert len(teacher.asked) == 10
        assert preferences(SHORTER, lists, scores, store=store, show_progress=False)[0].shape == (18, 3)
        assert store.count() == 36, "another teacher has answers of its own"


def test_a_pointwise_teacher_is_not_asked_twice() -> None:
    """The builder has its scores already; a preference from them costs a subtraction, not another run."""
    teacher = LengthTeacher(scale=0.1)
    with ScoreStore(":memory:") as store:
        dataset = build(candidates=HAND, teacher=teacher, pairwise=CrossEncoderPairwiseTeacher(teacher), store=store)
    assert teacher.scored == sum(len(row["document_ids"]) for row in dataset.train)
    for row in dataset.train:
        for pair in row["preferences"]:
            margin = row["scores"][pair["first"]] - row["scores"][pair["second"]]
            assert pair["probability"] == pytest.approx(1 / (1 + math.exp(-margin)), rel=1e-5)


def test_preferences_survive_disk_and_other_readers(tmp_path: Path) -> None:
    """A column that is dropped on the way would turn PairDistill into plain KL, or into an error far away."""
    dataset = build(candidates=HAND, pairwise=SHORTER)
    dataset.train = dataset.train.with_format("torch")
    folder = dataset.save_to_disk(tmp_path / "dataset")
    loaded = DistillationDataset.load_from_disk(folder)
    assert loaded.train.features == features("train", preferences=True)
    assert loaded.train.to_list() == dataset.train.with_format(None).to_list()
    assert loaded.to_lists().to_list() == dataset.to_lists().to_list()
    assert load_dataset(str(folder), "train", split="train").to_list() == loaded.train.to_list()
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "a pairwise teacher's `probability`" in card
    assert "teacher.model `shorter`" in card
    assert "preferences" not in (build(candidates=HAND).save_to_disk(tmp_path / "plain") / "README.md").read_text()
    assert set(loaded.to_columns(n=2).column_names) == {"query", "positive", "negative_1", "label"}


def test_the_loss_learns_from_what_the_builder_wrote(tiny_bert_path: Path) -> None:
    """The whole way: pairs of the builder move the student, and a row without any adds nothing and divides nothing."""
    dataset = build(candidates=HAND, pairwise=SHORTER)
    model = make_student("dense", tiny_bert_path)
    loss = PairDistillLoss(model)

    def pair_term(rows: list[dict[str, Any]]) -> float:
        batch = features_and_labels(ListwiseCollator(model), rows, "dense", model)
        value, found = gradients(loss, model, *batch)
        assert math.isfinite(value)
        assert any(gradient.any() for gradient in found.values())
        return loss(*features_and_labels(ListwiseCollator(model), rows, "dense", model))[
            "PairwisePreferenceLoss"
        ].item()

    rows = dataset.to_lists().to_list()
    assert pair_term(rows) > 0
    assert pair_term([{**row, "pairs": []} for row in rows]) == 0
    assert pair_term([rows[0], {**rows[1], "pairs": None}]) == pytest.approx(pair_term(rows[:1]), rel=1e-5)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ((0, 2, 0.5), r"query 'q' has the preference .*'second': 2.* names no two of its 2 documents"),
        ((-1, 0, 0.5), "query 'q' has the preference"),
        ((1, 1, 0.5), "query 'q' has the preference"),
        ((0, 1, 1.5), "or is no probability"),
        ((0, 1, math.nan), "or is no probability"),
        ((0, 1, None), "or is no probability"),
        ((None, 1, 0.5), "query 'q' has the preference"),
    ],
)
def test_bad_preferences_name_their_row(pair: tuple[Any, Any, Any], message: str) -> None:
    """An absent candidate would silently become another document's preference, a NaN a dead student."""
    preference = dict(zip(("first", "second", "probability"), pair, strict=True))
    row = {"query_id": "q", "document_ids": ["d", "e"], "scores": [1.0, 2.0], "labels": [1, 0]}
    train = Dataset.from_list([{**row, "preferences": [preference]}], features=features("train", preferences=True))
    queries = Dataset.from_list([{"query_id": "q", "text": "query"}])
    documents = Dataset.from_list([{"document_id": key, "text": key} for key in "de"])
    with pytest.raises(ValueError, match=message):
        DistillationDataset(train, queries, documents)


def test_preferences_need_one_list_for_each_row() -> None:
    """Shifted by one row, every preference would be about other documents."""
    dataset = build(candidates=HAND)
    with pytest.raises(ValueError, match="preferences for 1 rows, but there are 2"):
        dataset.with_preferences([[]])
    assert dataset.with_preferences([[], []]).to_lists()["pairs"] == [[], []]


def test_pointwise_scores_imply_preferences() -> None:
    """Without a pairwise teacher the study's best loss would be out of reach; a pair turned round teaches errors."""
    dataset = build(candidates=HAND)
    made = dataset.with_pointwise_preferences(window=1)
    for row, pairs in zip(dataset.to_lists(), made.to_lists()["pairs"], strict=True):
        ranking = sorted(range(len(row["scores"])), key=lambda place: -row["scores"][place])
        assert [(int(i), int(j)) for i, j, _ in pairs] == list(pairwise(ranking))
        for i, j, probability in pairs:
            better, worse = row["scores"][int(i)], row["scores"][int(j)]
            assert probability == pytest.approx(1 / (1 + math.exp(worse - better)), rel=1e-6)
    assert made.provenance["preferences"]["teacher"] == "the dataset's own scores"
    assert "preferences" not in dataset.train.column_names


def test_distill_takes_implied_preferences_and_says_so(
    static_student_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The loss's own error would send people without a duo reranker away."""
    args = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=1, report_to="none"
    )
    made = distill(static_student_path, build(candidates=HAND), "pair-distill", args, output_dir=tmp_path / "student")
    assert made.record.dataset["preferences"]["teacher"] == "the dataset's own scores"
    assert "No pairwise teacher has seen this dataset" in caplog.text
