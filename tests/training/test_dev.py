"""Evaluation on a dev split during training, and what training logs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from transformers import TrainerCallback

from st_wkl import evaluate
from st_wkl.data.candidates import Candidate
from st_wkl.data.collator import ListwiseCollator
from st_wkl.data.collection import Collection
from st_wkl.functional import weighted_kl
from st_wkl.losses import InBatchContrastiveLoss, WeightedKLDistillationLoss, WeightedSumLoss
from st_wkl.losses.lists import CandidateLists
from st_wkl.training.dev import GradedEvaluator
from st_wkl.training.guard import TeacherAgreementCallback, agreement, watch
from tests.helpers.animals import small_collection
from tests.helpers.students import CLASSES, make_student, ragged_rows


def graded() -> Collection:
    collection = small_collection()
    documents = list(collection.documents)
    qrels = {
        query: {**gains, **{documents[(7 * number + 3) % len(documents)]: 3}}
        for number, (query, gains) in enumerate(collection.qrels["test"].items())
    }
    return Collection("graded", collection.documents, collection.queries, {"dev": qrels})


def test_dev_scores_are_those_of_the_evaluation(static_student_path: Path) -> None:
    """A checkpoint that is chosen by another formula than it is judged by is chosen wrongly; upstream's is binary."""
    collection = graded()
    student = SentenceTransformer(str(static_student_path))
    found = GradedEvaluator.of(collection, "dev")(student)
    expected = evaluate(student, collection, split="dev", show_progress=False)
    assert found["dev_ndcg_at_10"] == pytest.approx(expected.ndcg_at_10, abs=1e-5)
    assert found["dev_recall_at_100"] == pytest.approx(expected.task().metrics["recall_at_100"], abs=1e-5)
    binary = Collection(
        "binary",
        collection.documents,
        collection.queries,
        {"dev": {query: dict.fromkeys(gains, 1) for query, gains in collection.qrels["dev"].items()}},
    )
    assert abs(GradedEvaluator.of(binary, "dev")(student)["dev_ndcg_at_10"] - found["dev_ndcg_at_10"]) > 1e-3


@pytest.mark.parametrize("kind", list(CLASSES))
def test_every_model_class_is_evaluated(kind: str, tiny_bert_path: Path) -> None:
    """Reranking the whole collection is searching it, for each class by its own similarity."""
    collection = graded()
    student = make_student(kind, tiny_bert_path)
    everything = {
        query: [Candidate(key, 0.0, rank, "all") for rank, key in enumerate(collection.documents, 1)]
        for query in collection.queries
    }
    # Only 100 candidates of a query are read.
    small = Collection("small", dict(list(collection.documents.items())[:90]), collection.queries, {})
    qrels = {
        query: {key: gain for key, gain in gains.items() if key in small.documents}
        for query, gains in collection.qrels["dev"].items()
    }
    small = Collection("small", small.documents, small.queries, {"dev": qrels})
    lists = {query: [hit for hit in hits if hit.document_id in small.documents] for query, hits in everything.items()}
    reranked = GradedEvaluator.of(small, "dev", candidates=lists)(student)
    assert 0 < reranked["dev_ndcg_at_10"] <= 1
    if kind == "cross-encoder":
        with pytest.raises(ValueError, match="can only rerank, and this dev split has no candidates"):
            GradedEvaluator.of(small, "dev")(student)
    else:
        assert GradedEvaluator.of(small, "dev")(student)["dev_ndcg_at_10"] == pytest.approx(
            reranked["dev_ndcg_at_10"], abs=1e-6
        )


def test_unusable_dev_splits_are_refused(static_student_path: Path) -> None:
    """An empty split would give 0/0 after the first epoch, a diverged student a number that means nothing."""
    collection = graded()
    nothing = {query: dict.fromkeys(gains, 0) for query, gains in collection.qrels["dev"].items()}
    with pytest.raises(ValueError, match="no query with a relevant document"):
        GradedEvaluator(collection.queries, collection.documents, nothing)
    with pytest.raises(ValueError, match="has no split 'validation'"):
        GradedEvaluator.of(collection, "validation")
    with pytest.raises(ValueError, match="has no text"):
        GradedEvaluator({}, collection.documents, collection.qrels["dev"])
    student = SentenceTransformer(str(static_student_path))
    with torch.no_grad():
        next(student.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="weights have diverged"):
        GradedEvaluator.of(collection, "dev")(student)


def test_a_part_of_the_split_is_the_same_part_each_time(static_student_path: Path) -> None:
    """Two checkpoints are only comparable on the same queries and documents; all judged documents have to be there."""
    collection = graded()
    first, second = (GradedEvaluator.of(collection, "dev", max_queries=5, max_documents=20) for _ in range(2))
    assert first.queries == second.queries
    assert first.documents == second.documents
    assert len(first.queries) == 5
    assert len(first.documents) == 20
    assert {key for gains in first.qrels.values() for key in gains} <= first.documents.keys()


class Reporter(TrainerCallback):
    """What `report_to` would be given."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.lines.append(dict(logs))


@pytest.mark.parametrize("mini_batch_size", [None, 4])
def test_reporters_hear_terms_agreement_and_weights(
    mini_batch_size: int | None, tiny_bert_path: Path, tmp_path: Path
) -> None:
    """Loss values of two runs do not compare; agreement with the teacher does, so it has to reach the dashboard."""
    student, reporter = make_student("dense", tiny_bert_path), Reporter()
    terms = [(1.0, WeightedKLDistillationLoss(student)), (0.1, InBatchContrastiveLoss(student))]
    loss = WeightedSumLoss(student, terms, mini_batch_size=mini_batch_size)
    args = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, logging_steps=2, learning_rate=1e-3
    )
    args.report_to, args.save_strategy, args.disable_tqdm = [], "no", True
    data, collator = Dataset.from_list(ragged_rows(12)), ListwiseCollator(student)
    trainer = SentenceTransformerTrainer(student, args, data, loss=loss, data_collator=collator, callbacks=[reporter])
    watch(trainer, loss)
    trainer.train()
    lines = [line for line in reporter.lines if "loss" in line]
    assert len(lines) == 2
    for line in (*lines, *(entry for entry in trainer.state.log_history if "loss" in entry)):
        assert 0 <= line["teacher_agreement"] <= 1
        assert 0 < line["mean_weight"] < 1
        assert {"WeightedKLDistillationLoss", "InBatchContrastiveLoss"} <= line.keys()
    assert terms[0][1].observer is None, "a loss that is not trained any more must not keep its batches"


def test_agreement_is_the_share_of_pairs() -> None:
    """By hand: padding does not count, ties count one half."""
    nan = float("nan")
    student = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 9.0], [1.0, 1.0, 9.0]])
    teacher = torch.tensor([[1.0, 3.0, 2.0], [5.0, 7.0, nan], [5.0, 7.0, nan]])
    mask = torch.tensor([[True, True, True], [True, True, False], [True, True, False]])
    assert agreement(student, teacher, mask).tolist() == pytest.approx([1 / 3, 1.0, 0.5])


def test_batches_of_different_widths_are_averaged_as_they_are(tiny_bert_path: Path) -> None:
    """They are computed as one, which is cheaper and must not change a value."""
    loss = WeightedKLDistillationLoss(make_student("dense", tiny_bert_path))

    def batch(student: list[float], teacher: list[float], gains: list[float]) -> tuple[torch.Tensor, CandidateLists]:
        whole = torch.ones(1, len(gains), dtype=torch.bool)
        lists = CandidateLists(torch.tensor([teacher]), torch.tensor([gains]), torch.zeros(whole.shape), whole, None)
        return torch.tensor([student]), lists

    def logged(*batches: tuple[torch.Tensor, CandidateLists]) -> dict[str, float]:
        callback = TeacherAgreementCallback(loss)
        callback.seen.extend(batches)
        return callback.values()

    short, long = batch([0.9, 0.1], [2.0, 1.0], [1.0, 0.0]), batch([0.3, 0.2, 0.1], [1.0, 2.0, 3.0], [0.0, 1.0, 0.0])
    first, second, both = logged(short), logged(long), logged(short, long)
    assert [values["teacher_agreement"] for values in (first, second, both)] == [1.0, 0.0, 0.5]
    expected = (2 * first["mean_weight"] + 3 * second["mean_weight"]) / 5
    assert both["mean_weight"] == pytest.approx(expected, abs=2e-4)


def test_mean_weight_is_the_weight_of_the_loss() -> None:
    """A logged weight that is not the one that trains would mislead: the loss is the weighted sum of KL's terms."""
    from st_wkl.functional import contrastive_weights

    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
    positives = torch.rand(4, 6, generator=generator) < 0.3
    settings: dict[str, Any] = {"gamma": 3.0, "alpha": 0.5, "student_temperature": 0.7}
    terms = weighted_kl(student, teacher, positives, **settings, reduction="none")
    plain = weighted_kl(student, teacher, positives, **{**settings, "gamma": 0, "alpha": 0}, reduction="none")
    torch.testing.assert_close(terms / plain, contrastive_weights(student, positives, **settings))


def test_losses_without_lists_log_nothing() -> None:
    """Upstream's losses have no lists to look at; training them must go on as ever."""
    callback = TeacherAgreementCallback(torch.nn.Linear(1, 1))
    logs: dict[str, Any] = {"loss": 1.0}
    callback.on_log(None, None, None, logs=logs)  # type: ignore[arg-type]
    assert logs == {"loss": 1.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": {"q": None}}, "text of query 'q' is a NoneType"),
        ({"documents": {"a": 3.5}}, "text of document 'a' is a float, 3.5"),
        ({"candidates": {"q": "a"}}, "candidates of query 'q' have to be document ids, got 'a'"),
        ({"candidates": {"q": [1, 2]}}, r"candidates of query 'q' have to be document ids, got \[1, 2\]"),
    ],
)
def test_odd_types_name_the_query(changes: dict[str, Any], message: str) -> None:
    """An AttributeError of a None among thousands of texts says nothing of where it stands."""
    given: dict[str, Any] = {"queries": {"q": "who"}, "documents": {"a": "cats"}, "qrels": {"q": {"a": 1}}, **changes}
    with pytest.raises(TypeError, match=message):
        GradedEvaluator(**given)
