"""A step waits for the device no more than upstream's, and what is wrong with a batch still reaches no optimizer."""

from __future__ import annotations

import logging
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.data_collator import BaseDataCollator
from sentence_transformers.sentence_transformer.losses import AdaptiveLayerLoss, DistillKLDivLoss, MatryoshkaLoss
from sentence_transformers.sparse_encoder.losses import CachedSpladeLoss, SpladeLoss
from sentence_transformers.util import pairwise_dot_score
from torch.profiler import ProfilerActivity, profile

import st_wkl.losses as ours
from st_wkl.functional import _checks
from st_wkl.losses import (
    CoherenceLoss,
    InBatchContrastiveLoss,
    MarginKL,
    MarginMSEDistillLoss,
    WeightedKLDistillationLoss,
    WeightedSumLoss,
)
from st_wkl.training.guard import check_loss_values
from tests.helpers.students import (
    column_rows,
    features_and_labels,
    gradients,
    listwise_batch,
    make_student,
    paired_rows,
    ragged_rows,
    rows_with_paraphrases,
    trained,
)
from tests.helpers.vectors import vectors_for
from tests.losses.test_losses import rows, train

# What makes a host wait for its device: a value is read, or the size of a result hangs on values.
WAITS = {
    f"aten::{name}" for name in ("_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "masked_select", "equal")
}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat the tensors of the CPU as those of a device, whose values take time to come."""
    monkeypatch.setattr(_checks, "waits", lambda tensor: True)


def count(loss: Any, batch: Any) -> Counter[str]:
    """Count what a step waits for, the second one, in which nothing is said that is said once."""

    def step() -> None:
        value = loss([dict(column) for column in batch[0]], batch[1])
        (sum(value.values()) if isinstance(value, dict) else value).backward()

    step()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        step()
    return Counter(event.name for event in recorded.events() if event.name in WAITS)


FREE = [name for name in ours.__all__ if name not in ("AdaptiveRelevanceMarginLoss", "CoherenceLoss")]


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("name", FREE)
@pytest.mark.parametrize("layout", ["columns", "lists"])
def test_a_step_waits_for_nothing(name: str, layout: str, tiny_bert_path: Path) -> None:
    """Each value that is read in the middle of a step leaves the device without work: it was 5 to 8 times a step."""
    model = make_student("dense", tiny_bert_path)
    loss: Any
    given: dict[str, Any]
    if name == "WeightedSumLoss":
        parts = [(1.0, WeightedKLDistillationLoss(model)), (1.0, InBatchContrastiveLoss(model))]
        loss, given = WeightedSumLoss(model, parts), {}
    else:
        options: Any = {"similarity_fct": pairwise_dot_score} if name == "MSEDistillLoss" else {}
        given = {"vectors": vectors_for(paired_rows())} if name == "EmbeddingDistillLoss" else {}
        loss = getattr(ours, name)(model, **options, **given)
    columns = features_and_labels(BaseDataCollator(model.preprocess), column_rows(), "dense", model)
    batch = columns if layout == "columns" else listwise_batch(model, "dense", paired_rows(), **given)
    if ("Pair" in name or name == "EmbeddingDistillLoss") and layout == "columns":
        return  # takes lists alone
    # What upstream's loss waits for is the model's doing.
    assert count(loss, batch) == count(DistillKLDivLoss(model), columns)


@pytest.mark.slow
@pytest.mark.usefixtures("device")
def test_coherence_waits_for_nothing(tiny_bert_path: Path) -> None:
    """Missing paraphrases are left out by their label, not by the size of a selection."""
    model = make_student("dense", tiny_bert_path)
    batch = features_and_labels(BaseDataCollator(model.preprocess), rows_with_paraphrases((1,)), "dense", model)
    columns = features_and_labels(BaseDataCollator(model.preprocess), column_rows(), "dense", model)
    assert count(CoherenceLoss(model), batch) == count(DistillKLDivLoss(model), columns)


AROUND: dict[str, Any] = {
    "alone": lambda m: WeightedKLDistillationLoss(m),
    "cached": lambda m: WeightedKLDistillationLoss(m, mini_batch_size=2),
    "sum": lambda m: WeightedSumLoss(m, [(1.0, MarginKL(m)), (1.0, InBatchContrastiveLoss(m))]),
    "sum, cached": lambda m: WeightedSumLoss(m, [(1.0, MarginKL(m))], mini_batch_size=2),
    "matryoshka": lambda m: MatryoshkaLoss(m, MarginKL(m), [32, 8]),
    "matryoshka, cached": lambda m: MatryoshkaLoss(m, MarginKL(m, mini_batch_size=2), [32, 8]),
    "layers": lambda m: AdaptiveLayerLoss(m, MarginKL(m)),
    "splade": lambda m: SpladeLoss(m, MarginKL(m), 1e-3, 1e-3),
    "cached splade": lambda m: CachedSpladeLoss(m, MarginKL(m), 1e-3, 1e-3, mini_batch_size=2),
}


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("around", list(AROUND))
@pytest.mark.parametrize("bad", [math.nan, -math.inf, 3e7])
def test_a_bad_label_stops_the_backward_pass(around: str, bad: float, tiny_bert_path: Path) -> None:
    """What is known only when the backward pass ends has to come before an optimizer steps, whatever is around it."""
    kind = "sparse" if "splade" in around else "dense"
    model = make_student(kind, tiny_bert_path)
    features, labels = listwise_batch(model, kind, ragged_rows())
    labels[1, 0, 0] = bad
    loss = AROUND[around](model)
    if around != "cached splade":  # upstream reads its terms at once
        loss([dict(column) for column in features], labels)
    with pytest.raises(ValueError, match=r"teacher_scores\[1, 0\] is .* \(1 such values"):
        gradients(loss, model, features, labels)
    gradients_there = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(bool(gradient.isfinite().all()) for gradient in gradients_there), "other processes take part in them"
    again, _ = gradients(loss, model, *listwise_batch(model, kind, ragged_rows()))  # nothing is left of the bad batch
    assert math.isfinite(again)
    with torch.no_grad(), pytest.raises(ValueError, match=r"teacher_scores\[1, 0\] is"):  # nothing to wait for
        loss([dict(column) for column in features], labels)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_stock_trainer_stops_before_the_step(
    bad: float, accumulate: int, static_student_path: Path, tmp_path: Path
) -> None:
    """The promise holds without callbacks of ours: the trainer itself looks at no loss."""
    student = SentenceTransformer(str(static_student_path))
    options = {"dataloader_drop_last": False, "gradient_accumulation_steps": accumulate}
    with pytest.raises(ValueError, match=r"teacher_scores\[\d, 1\] is") as raised:
        train(student, MarginKL(student), rows(bad=bad), tmp_path, **options)
    assert any(entry.name == "training_step" for entry in raised.traceback)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in student.parameters())


@pytest.mark.usefixtures("device")
def test_what_else_is_wrong_stops_it_too(tiny_bert_path: Path) -> None:
    """A student that has diverged, lists that name more documents than arrived, ranks that are missing."""
    model = make_student("dense", tiny_bert_path)
    features, labels = listwise_batch(model, "dense", ragged_rows())
    fewer = [features[0], {name: value[:-2] for name, value in features[1].items() if isinstance(value, torch.Tensor)}]
    for loss in (MarginKL(model), InBatchContrastiveLoss(model)):
        with pytest.raises(ValueError, match=r"documents, but \d+ arrived at the loss"):
            gradients(loss, model, fewer, labels)
    with pytest.raises(ValueError, match="needs lists with a column 'ranks'"):
        gradients(WeightedKLDistillationLoss(model, ranks="dataset"), model, features, labels)
    watched = MarginKL(model)
    watched.register_forward_hook(lambda module, inputs, output: output * math.nan)
    watched.register_forward_hook(check_loss_values)
    value = watched([dict(column) for column in features], labels)
    with pytest.raises(ValueError, match="MarginKL: the loss of this batch is nan"):
        value.backward()
    next(model.parameters()).data[:] = math.nan
    value = MarginKL(model)([dict(column) for column in features], labels)
    with pytest.raises(ValueError, match="student's scores in row 0 of this batch are NaN"):
        value.backward()


@pytest.mark.usefixtures("device")
def test_counts_are_those_of_reading_at_once(tiny_bert_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is counted and said comes late, not never."""
    model = make_student("dense", tiny_bert_path)
    batch = listwise_batch(model, "dense", ragged_rows())
    loss = WeightedKLDistillationLoss(model, mini_batch_size=2)
    for _ in range(2):
        gradients(loss, model, *batch)
    assert loss.rows_without_positive == 2 * sum(not any(row["labels"]) for row in ragged_rows())
    assert caplog.text.count("have no positive") == 1


def nothing_to_learn(model: Any) -> dict[str, tuple[Any, list[dict[str, Any]]]]:
    """Return losses, each with rows from which it learns nothing."""
    plain = column_rows()
    excluded = [{**row, "label": [-math.inf, 1.0, 0.0]} for row in plain]
    alone = [{**row, "label": [1.0, -math.inf, -math.inf]} for row in plain]
    level = [{**row, "label": [1.0, 1.0, 1.0]} for row in plain]
    # Each query is its positive, and the teacher is sure of it: cosine 1 at temperature .001 leaves the rest nothing.
    right = [{**row, "positive": row["query"], "label": [9.0, 0.0, -9.0]} for row in plain]
    return {
        "contrast": (InBatchContrastiveLoss(model), excluded),
        "lists": (ours.ListContrastiveLoss(model), excluded),
        "margins": (ours.AdaptiveRelevanceMarginLoss(model), excluded),
        "margin kl": (MarginKL(model), excluded),
        "margin mse": (MarginMSEDistillLoss(model, mini_batch_size=2), excluded),
        "kl": (WeightedKLDistillationLoss(model, gamma=0, alpha=0), alone),
        "order": (ours.RankNetDistillLoss(model), level),
        "correlation": (ours.PearsonDistillLoss(model), level),
        "weights": (WeightedKLDistillationLoss(model, student_temperature=0.001), right),
    }


@pytest.mark.parametrize("reading", ["at once", "late"])
@pytest.mark.parametrize(
    "name", ["contrast", "lists", "margins", "margin kl", "margin mse", "kl", "order", "correlation", "weights"]
)
def test_a_batch_that_teaches_nothing_is_said(
    name: str, reading: str, tiny_bert_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its loss looks like the best of all: 0, or -2e-19 where the weights have vanished."""
    if reading == "late":
        monkeypatch.setattr(_checks, "waits", lambda tensor: True)
    model = make_student("dense", tiny_bert_path)
    loss, few = nothing_to_learn(model)[name]
    batch = features_and_labels(BaseDataCollator(model.preprocess), few, "dense", model)
    for _ in range(2):
        gradients(loss, model, *batch)
    assert loss.batches_without_gradient == 2
    assert caplog.text.count("gives the embeddings of this batch no gradient") == 1
    caplog.clear()
    columns = features_and_labels(BaseDataCollator(model.preprocess), column_rows(), "dense", model)
    gradients(loss, model, *columns)
    assert loss.batches_without_gradient == 2
    term = WeightedSumLoss(model, [(1.0, MarginKL(model)), (0.0, MarginKL(model))])
    gradients(term, model, *columns)
    assert "no gradient" not in caplog.text, "a weight of 0 is the user's word"


def test_training_with_nothing_to_learn_is_said(
    tiny_bert_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In the stock trainer, where there is nobody else to notice."""
    model = make_student("dense", tiny_bert_path)
    excluded = [{**row, "label": [-math.inf, 1.0, 0.0]} for row in column_rows()]
    with caplog.at_level(logging.WARNING):
        trained(
            "dense", model, InBatchContrastiveLoss(model), tmp_path, Dataset.from_list(excluded), data_collator=None
        )
    assert "InBatchContrastiveLoss gives the embeddings of this batch no gradient" in caplog.text


def test_copies_are_found_without_a_search() -> None:
    """Equal embeddings have one number on every process; what differs in one bit has another."""
    from st_wkl.losses.in_batch import _first_copies, _hashes

    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        documents = torch.randn(40, 16, generator=generator).to(dtype)
        documents[7], documents[31], documents[0, 3], documents[12] = documents[3], documents[3], 0.0, documents[0]
        documents[12, 3] = -0.0
        numbers = _first_copies(_hashes(documents))
        expected = torch.arange(40)
        expected[7], expected[31], expected[12] = 3, 3, 0
        assert numbers.tolist() == expected.tolist()
    many = _hashes(torch.nn.functional.normalize(torch.randn(200_000, 4, generator=generator), dim=1))
    assert len(many.unique()) == 200_000


def test_options_of_upstream_are_answered_in_words(tiny_bert_path: Path) -> None:
    """`temperature=` and a similarity by position are upstream's; Python's own errors name neither."""
    from sentence_transformers.util import pairwise_dot_score

    model = make_student("dense", tiny_bert_path)
    for name in FREE:
        kind = getattr(ours, name)
        with pytest.raises(TypeError, match=f"^{name} takes (its similarity by name|no pairwise)"):
            kind(model, pairwise_dot_score)
        if name != "InBatchContrastiveLoss":
            with pytest.raises(TypeError, match=f"^{name} has no option temperature=0.1"):
                kind(model, temperature=0.1)
    embeddings = [torch.randn(4, 8) for _ in range(4)]
    for labels in (torch.zeros(4, 2), torch.zeros(4)):
        columns = embeddings if labels.ndim == 2 else embeddings[:3]
        with pytest.raises(ValueError, match="look like margins, as upstream's MarginMSELoss takes them"):
            MarginMSEDistillLoss(model).compute_loss_from_embeddings(columns, labels)
