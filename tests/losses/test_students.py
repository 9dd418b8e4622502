"""Every loss on every model class: ragged lists, bounded memory, and agreement with loops and with upstream."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers.base.data_collator import BaseDataCollator
from sentence_transformers.cross_encoder.data_collator import CrossEncoderDataCollator
from sentence_transformers.multi_vector_encoder.data_collator import MultiVectorEncoderDataCollator
from sentence_transformers.multi_vector_encoder.losses import MultiVectorDistillKLDivLoss
from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss
from sentence_transformers.sparse_encoder.losses import CachedSpladeLoss, SparseDistillKLDivLoss, SpladeLoss
from sentence_transformers.util import pairwise_cos_sim
from torch import Tensor

from st_wkl.losses import InBatchContrastiveLoss, MarginKL, WeightedKLDistillationLoss, WeightedSumLoss
from st_wkl.losses.make import make_loss as loss_by_name
from tests.helpers.students import (
    CLASSES,
    EXACT,
    assert_same,
    column_rows,
    features_and_labels,
    gradients,
    listwise_batch,
    make_student,
    one_score,
    ragged_rows,
)

COLLATORS: dict[str, Any] = {
    "dense": BaseDataCollator,
    "sparse": BaseDataCollator,
    "multi-vector": MultiVectorEncoderDataCollator,
    "cross-encoder": CrossEncoderDataCollator,
}
KINDS = list(CLASSES)
EMBEDDING_KINDS = KINDS[:3]


def make_loss(name: str, model: Any, **options: Any) -> Any:
    if name == "weighted-kl":
        return WeightedKLDistillationLoss(model, gamma=2.0, alpha=0.5, **options)
    if name == "margin-kl":
        return MarginKL(model, **options)
    if name == "in-batch":
        return InBatchContrastiveLoss(model, **options)
    terms = [(1.0, WeightedKLDistillationLoss(model)), (0.5, MarginKL(model))]
    if not isinstance(model, CLASSES["cross-encoder"]):
        terms.append((0.1, InBatchContrastiveLoss(model)))
    return WeightedSumLoss(model, terms, **options)


# Upstream computes MaxSim in float32, whatever it is given.
LOSSES = ["weighted-kl", "margin-kl", "in-batch", "sum"]
COMBINATIONS = [(kind, loss) for kind in KINDS for loss in LOSSES if (kind, loss) != ("cross-encoder", "in-batch")]


def loop_weighted_kl(model: Any, kind: str, rows: list[dict[str, Any]], gamma: float, alpha: float) -> Tensor:
    """Weighted KL row by row and document by document."""
    temperature = 0.05 if kind == "dense" else 1.0
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        scores = [one_score(model, kind, row["query"], document) / temperature for document in row["documents"]]
        log_q = [score - torch.logsumexp(torch.stack(scores), dim=0) for score in scores]
        teacher = torch.tensor(row["scores"], dtype=torch.float32).double()  # labels travel as float32
        log_p = teacher.log_softmax(dim=0)
        ranks = [1 + sum(bool(other > score) for other in scores) for score in scores]
        best = min((rank for rank, gain in zip(ranks, row["labels"], strict=True) if gain >= 1), default=None)
        for i, gain in enumerate(row["labels"]):
            q = log_q[i].exp()
            beta = 0.0 if best is None else alpha * (1 / ranks[i] - 1 / best)
            weight = (1 - q) ** gamma if gain >= 1 else q ** (gamma - beta)
            total = total + weight * log_p[i].exp() * (log_p[i] - log_q[i])
    return total / len(rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mini_batch_size", [None, 3])
def test_ragged_lists_equal_a_loop(kind: str, mini_batch_size: int | None, tiny_bert_path: Path) -> None:
    """Padding, shared documents, length sorting and caching must all be invisible: a loop has none of them."""
    model = make_student(kind, tiny_bert_path).double().train()
    rows = ragged_rows()
    loss = WeightedKLDistillationLoss(
        model, gamma=2.0, alpha=0.5, detach_weights=False, mini_batch_size=mini_batch_size
    )
    value, found = gradients(loss, model, *listwise_batch(model, kind, rows))
    model.zero_grad()
    expected = loop_weighted_kl(model, kind, rows, 2.0, 0.5)
    expected.backward()
    assert value == pytest.approx(expected.item(), abs=EXACT[kind])
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert_same(found, wanted, EXACT[kind])


@pytest.mark.parametrize(("kind", "loss"), COMBINATIONS)
@pytest.mark.parametrize("layout", ["lists", "columns"])
def test_gradient_cache_changes_nothing(kind: str, loss: str, layout: str, tiny_bert_path: Path) -> None:
    """A cached gradient that belongs to another row or another order trains quietly in a wrong direction."""
    model = make_student(kind, tiny_bert_path).double().train()
    if layout == "lists":
        batch = listwise_batch(model, kind, ragged_rows())
    else:
        batch = features_and_labels(COLLATORS[kind](model.preprocess), column_rows(), kind, model)
    plain_value, plain = gradients(make_loss(loss, model), model, *batch)
    value, cached = gradients(make_loss(loss, model, mini_batch_size=2), model, *batch)
    assert value == pytest.approx(plain_value, abs=EXACT[kind])
    assert_same(plain, cached, EXACT[kind])
    with torch.no_grad():
        evaluated = make_loss(loss, model, mini_batch_size=2)(*batch)
    total = sum(evaluated.values()) if isinstance(evaluated, dict) else evaluated
    assert total.item() == pytest.approx(plain_value, abs=EXACT[kind])


@pytest.mark.parametrize("kind", EMBEDDING_KINDS)
@pytest.mark.parametrize("mini_batch_size", [None, 3])
def test_equals_upstream_without_weights(kind: str, mini_batch_size: int | None, tiny_bert_path: Path) -> None:
    """γ=0, α=0 must be the KL that each model class already has, or the comparison with it means nothing."""
    model = make_student(kind, tiny_bert_path).train()
    batch = features_and_labels(COLLATORS[kind](model.preprocess), column_rows(candidates=4), kind, model)
    ours = WeightedKLDistillationLoss(model, gamma=0, alpha=0, student_temperature=0.1, mini_batch_size=mini_batch_size)
    if kind == "sparse":
        distill = SparseDistillKLDivLoss(model, student_temperature=0.1, teacher_temperature=1.0)
        features, labels = batch
        embeddings = [model(dict(feature))["sentence_embedding"] for feature in features]
        model.zero_grad()
        expected = distill.compute_loss_from_embeddings(embeddings, labels) / 0.1**2
        expected.backward()
        wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        expected_value = expected.item()
    else:
        upstream = (
            DistillKLDivLoss(model, similarity_fct=pairwise_cos_sim, student_temperature=0.1)
            if kind == "dense"
            else MultiVectorDistillKLDivLoss(model, student_temperature=0.1)
        )
        expected_value, wanted = gradients(upstream, model, *batch)
        expected_value /= 0.1**2  # upstream multiplies by the squared student temperature
        wanted = {name: gradient / 0.1**2 for name, gradient in wanted.items()}
    value, found = gradients(ours, model, *batch)
    assert value == pytest.approx(expected_value, rel=1e-5, abs=1e-5)
    assert_same(wanted, found, 1e-5)


@pytest.mark.parametrize(("kind", "loss"), [c for c in COMBINATIONS if c[1] in ("weighted-kl", "margin-kl")])
def test_a_batch_is_the_mean_of_its_rows(kind: str, loss: str, tiny_bert_path: Path) -> None:
    """Whatever leaks through padding or shared documents makes a row's loss depend on its neighbours."""
    model = make_student(kind, tiny_bert_path).double().train()
    rows = ragged_rows()
    together = make_loss(loss, model)(*listwise_batch(model, kind, rows)).item()
    alone = [make_loss(loss, model)(*listwise_batch(model, kind, [row])).item() for row in rows]
    assert together == pytest.approx(sum(alone) / len(alone), abs=EXACT[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_masked_places_never_leak(kind: str, junk: float, tiny_bert_path: Path) -> None:
    """Padding is the one place where NaN is normal; it must change neither value nor gradient."""
    model = make_student(kind, tiny_bert_path).double().train()
    features, labels = listwise_batch(model, kind, ragged_rows())
    value, wanted = gradients(make_loss("sum", model), model, features, labels)
    absent = labels[..., 2] < 0
    assert absent.any()
    dirty = labels.clone()
    dirty[..., 0][absent] = junk
    dirty[..., 1][absent] = junk
    wider = torch.cat([dirty, dirty.new_full((len(dirty), 2, dirty.shape[2]), junk)], dim=1)
    wider[:, -2:, 2] = -1.0
    again, found = gradients(make_loss("sum", model), model, features, wider)
    assert again == pytest.approx(value, abs=EXACT[kind])
    assert_same(wanted, found, EXACT[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_lists_and_columns_agree(kind: str, tiny_bert_path: Path) -> None:
    """The same data in either layout is the same training; else a change of collator would change results."""
    model = make_student(kind, tiny_bert_path).double().train()
    rows = column_rows(candidates=4)
    texts = [[row["positive"], *(row[f"negative_{i}"] for i in range(1, 4))] for row in rows]
    lists = [
        {"query": row["query"], "documents": documents, "scores": row["label"], "labels": [1, 0, 0, 0]}
        for row, documents in zip(rows, texts, strict=True)
    ]
    columns = features_and_labels(COLLATORS[kind](model.preprocess), rows, kind, model)
    first_value, first = gradients(make_loss("sum", model), model, *columns)
    second_value, second = gradients(make_loss("sum", model), model, *listwise_batch(model, kind, lists))
    assert first_value == pytest.approx(second_value, abs=1e-6)
    assert_same(first, second, 1e-6)


@pytest.mark.parametrize("cached", [False, True])
def test_inside_splade_losses(cached: bool, tiny_bert_path: Path) -> None:
    """Sparse students need the regularisers of SpladeLoss, which call a loss by its embeddings alone."""
    model = make_student("sparse", tiny_bert_path).double().train()
    batch = listwise_batch(model, "sparse", ragged_rows())
    inner = make_loss("sum", model)
    weights = {"document_regularizer_weight": 1e-3, "query_regularizer_weight": 1e-3}
    value, wanted = gradients(SpladeLoss(model, inner, **weights), model, *batch)
    if cached:
        again, found = gradients(CachedSpladeLoss(model, inner, mini_batch_size=2, **weights), model, *batch)
        assert again == pytest.approx(value, abs=1e-6)
        assert_same(wanted, found, 1e-6)
    else:
        assert math.isfinite(value)
        assert value > inner(*batch)["WeightedKLDistillationLoss"].item()


def test_threshold_says_what_is_positive(tiny_bert_path: Path) -> None:
    """With graded judgements, gain 1 may mean 'related': a wrong threshold rewards documents that are not relevant."""
    model = make_student("dense", tiny_bert_path).train()
    row = ragged_rows(1)[0]
    row["labels"] = [2, 1] + [0] * (len(row["documents"]) - 2)
    batch = listwise_batch(model, "dense", [row])
    only_first = dict(row, labels=[2, 0, *row["labels"][2:]])
    strict = WeightedKLDistillationLoss(model, positive_threshold=2)(*batch)
    torch.testing.assert_close(strict, WeightedKLDistillationLoss(model)(*listwise_batch(model, "dense", [only_first])))
    assert not torch.allclose(strict, WeightedKLDistillationLoss(model)(*batch))


def test_rows_without_positive_are_counted_and_may_be_skipped(tiny_bert_path: Path) -> None:
    """Such rows only push documents down; the user has to know how many there are and be able to leave them out."""
    model = make_student("dense", tiny_bert_path).double().train()
    rows = ragged_rows()
    without = sum(not any(row["labels"]) for row in rows)
    assert without > 0
    batch = listwise_batch(model, "dense", rows)
    kept = listwise_batch(model, "dense", [row for row in rows if any(row["labels"])])
    trains_on_all = WeightedKLDistillationLoss(model)
    skips = WeightedKLDistillationLoss(model, without_positive="skip")
    assert trains_on_all(*batch).item() != pytest.approx(skips(*batch).item(), abs=1e-9)
    assert skips(*batch).item() == pytest.approx(trains_on_all(*kept).item(), abs=1e-12)
    assert trains_on_all.rows_without_positive == without
    nothing = listwise_batch(model, "dense", [row for row in rows if not any(row["labels"])])
    value, found = gradients(skips, model, *nothing)
    assert value == 0
    assert all(not gradient.any() for gradient in found.values())


@pytest.mark.parametrize("name", ["margin-kl", "margin-mse", "list-contrastive", "margin-kl, all", "weighted-kl"])
def test_what_becomes_of_lists_without_positive_is_said_as_it_is(
    name: str, tiny_bert_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`Trained on as all-negative` stood there where a loss has nothing to compare and learns nothing of the list."""
    model = make_student("dense", tiny_bert_path)
    loss = loss_by_name(model, name.partition(",")[0], **({"pairs": "all"} if "all" in name else {}))
    loss(*listwise_batch(model, "dense", ragged_rows()))
    told = {"margin-kl, all": "trained on as all-negative", "weighted-kl": "weighed as negatives alone"}
    said = told.get(name, "counted as 0, since there is nothing to compare")
    for words in {*told.values(), "counted as 0, since there is nothing to compare"}:
        assert (f"They are {words}" in caplog.text) == (words == said)


def test_in_batch_term_leaves_out_what_is_relevant(tiny_bert_path: Path) -> None:
    """A positive that stands in another row's list is no negative, and pushing it away undoes the distillation."""
    model = make_student("dense", tiny_bert_path).double().train()
    rows = [
        {"query": "the of", "documents": ["and to in", "a is that"], "scores": [1.0, 0.0], "labels": [1, 0]},
        {"query": "for it", "documents": ["as was with", "and to in"], "scores": [1.0, 0.0], "labels": [1, 0]},
        {"query": "be by on", "documents": ["not he", "his but at"], "scores": [1.0, 0.0], "labels": [1, 1]},
    ]
    value = InBatchContrastiveLoss(model)(*listwise_batch(model, "dense", rows)).item()
    documents = list(dict.fromkeys(text for row in rows for text in row["documents"]))
    expected = []
    for row in rows:
        scores = {d: one_score(model, "dense", row["query"], d).item() / 0.05 for d in documents}
        relevant = [d for d, gain in zip(row["documents"], row["labels"], strict=True) if gain]
        negatives = sum(math.exp(score) for d, score in scores.items() if d not in relevant)
        terms = [math.log(math.exp(scores[d]) + negatives) - scores[d] for d in relevant]
        expected.append(sum(terms) / len(terms))
    assert value == pytest.approx(sum(expected) / len(expected), abs=1e-9)


def test_in_batch_term_recognises_copies_in_columns(tiny_bert_path: Path) -> None:
    """Columns carry no identity, so a copy of the positive in another row has to be found by its embedding."""
    model = make_student("dense", tiny_bert_path).double().train()
    rows = [
        {"query": "the of", "positive": "and to in", "negative_1": "a is that", "label": [1.0, 0.0]},
        {"query": "for it", "positive": "as was with", "negative_1": "and to in", "label": [1.0, 0.0]},
    ]
    batch = features_and_labels(BaseDataCollator(model.preprocess), rows, "dense", model)
    lists = [
        {"query": r["query"], "documents": [r["positive"], r["negative_1"]], "scores": r["label"], "labels": [1, 0]}
        for r in rows
    ]
    as_lists = InBatchContrastiveLoss(model)(*listwise_batch(model, "dense", lists)).item()
    assert InBatchContrastiveLoss(model)(*batch).item() == pytest.approx(as_lists, abs=1e-6)


def test_cross_encoders_cannot_take_the_in_batch_term(tiny_bert_path: Path) -> None:
    """It would silently cost the square of the batch, so it has to be refused before training."""
    with pytest.raises(ValueError, match="read every query with every"):
        InBatchContrastiveLoss(make_student("cross-encoder", tiny_bert_path))  # type: ignore[arg-type]


def test_mini_batches_of_static_students_are_refused(static_student_path: Path) -> None:
    """Static features have no rows to slice; upstream fails with an index error in the middle of a batch."""
    model = CLASSES["dense"](str(static_student_path))
    with pytest.raises(ValueError, match="no use for a static embedding model"):
        WeightedKLDistillationLoss(model, mini_batch_size=8)
    with pytest.raises(ValueError, match="must be at least 1"):
        WeightedKLDistillationLoss(model, mini_batch_size=0)
