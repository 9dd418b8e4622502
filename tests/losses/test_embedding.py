"""Embedding distillation: plain loops in float64, upstream's loss, gradients, and what composes with what."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers.sentence_transformer.losses import EmbedDistillLoss, MatryoshkaLoss
from torch import Tensor

from st_wkl.data.collator import ListwiseCollator
from st_wkl.losses import EmbeddingDistillLoss, InBatchContrastiveLoss, KLDistillLoss, WeightedSumLoss
from st_wkl.losses.lists import unpack, vectors_of, with_vectors
from st_wkl.training import make_loss
from tests.helpers.students import (
    assert_same,
    features_and_labels,
    gradients,
    listwise_batch,
    make_student,
    paired_rows,
    ragged_rows,
)
from tests.helpers.vectors import Numbers, vectors_for

ROWS = ragged_rows()


def embeddings_of(model: Any, batch: Any) -> list[Tensor]:
    return [model(dict(column))["sentence_embedding"].detach().requires_grad_() for column in batch[0]]


def of_batch(vectors: Any) -> list[np.ndarray]:
    """The teacher's vectors of `ROWS`, as the collator orders queries and different documents."""
    documents = list(dict.fromkeys(text for row in ROWS for text in row["documents"]))
    return [vectors.of([row["query"] for row in ROWS], "query"), vectors.of(documents, "document")]


def distance(kind: str, student: list[float], teacher: list[float]) -> float:
    if kind == "cosine":
        dot = sum(a * b for a, b in zip(student, teacher, strict=True))
        return 1 - dot / math.sqrt(sum(a * a for a in student) * sum(b * b for b in teacher))
    squares = sum((a - b) ** 2 for a, b in zip(student, teacher, strict=True))
    return math.sqrt(squares) if kind == "l2" else squares / len(student)


@pytest.mark.parametrize("projection", [None, "pca", "learned"])
@pytest.mark.parametrize("kind", ["cosine", "mse", "l2"])
def test_distances_equal_a_plain_loop(kind: Any, projection: Any, tiny_bert_path: Path) -> None:
    """The mean over queries and the mean over documents count alike, and each text has its own vector."""
    model = make_student("dense", tiny_bert_path).double()
    vectors = vectors_for(ROWS, Numbers({None: 32, "pca": 48, "learned": 20}[projection]))
    loss = EmbeddingDistillLoss(model, vectors, kind).double()
    assert loss.projection == projection
    batch = listwise_batch(model, "dense", ROWS, vectors=vectors)
    found = embeddings_of(model, batch)
    value = loss.compute_loss_from_embeddings(found, batch[1])
    means = []
    for student, teacher in zip(found, of_batch(vectors), strict=True):
        own, theirs = student.detach().numpy(), teacher.astype(np.float64)
        if projection == "pca":
            theirs = theirs @ vectors.principal(32).astype(np.float64)
        if projection == "learned":
            assert loss.upstream is not None
            layer: Any = loss.upstream.projection
            own = own @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        pairs = zip(own.tolist(), theirs.tolist(), strict=True)
        means.append(sum(distance(kind, a, b) for a, b in pairs) / len(own))
    assert value.item() == pytest.approx(sum(means) / 2, abs=1e-9)
    assert torch.autograd.gradcheck(lambda *e: loss.compute_loss_from_embeddings(list(e), batch[1]), found)


@pytest.mark.parametrize("texts", [False, True])
def test_relations_equal_a_plain_loop(texts: bool, tiny_bert_path: Path) -> None:
    """Of each query to all documents of the batch, or of each text to all others but itself."""
    model = make_student("dense", tiny_bert_path).double()
    vectors = vectors_for(ROWS, Numbers(20))
    loss = EmbeddingDistillLoss(model, vectors, "relational", student_temperature=0.3, teacher_temperature=0.2)
    if texts:
        rows = [{"text": row["query"], "side": "query"} for row in ROWS]
        rows += [
            {"text": text, "side": "document"} for text in dict.fromkeys(t for row in ROWS for t in row["documents"])
        ]
        batch: Any = features_and_labels(ListwiseCollator(model, vectors=vectors), rows[::-1], "dense", model)
    else:
        batch = listwise_batch(model, "dense", ROWS, vectors=vectors)
    found = embeddings_of(model, batch)
    value = loss.compute_loss_from_embeddings(found, batch[1])
    own, theirs = [e.detach().numpy() for e in found], [v.astype(np.float64) for v in of_batch(vectors)]
    if texts:  # the rows came in another order
        theirs = [v[::-1] for v in theirs]
        own, theirs = [np.concatenate(own)] * 2, [np.concatenate(theirs)] * 2

    def rows_of(sides: list[np.ndarray], temperature: float) -> list[list[float]]:
        first, second = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in sides)
        scores = (first @ second.T / temperature).tolist()
        return [[s for j, s in enumerate(row) if not texts or i != j] for i, row in enumerate(scores)]

    total = 0.0
    for student, teacher in zip(rows_of(own, 0.3), rows_of(theirs, 0.2), strict=True):
        p, q = ([math.exp(s) / sum(map(math.exp, row)) for s in row] for row in (teacher, student))
        total += sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
    assert value.item() == pytest.approx(total / len(own[0]), abs=1e-9)
    assert torch.autograd.gradcheck(lambda *e: loss.compute_loss_from_embeddings(list(e), batch[1]), found)


@pytest.mark.parametrize("kind", ["cosine", "mse", "l2"])
def test_it_is_upstreams_loss_on_upstreams_labels(kind: Any, tiny_bert_path: Path) -> None:
    """Whoever moves from `EmbedDistillLoss` with a label column finds the same number and the same gradient."""
    model = make_student("dense", tiny_bert_path).double()
    rows = [{**row, "documents": row["documents"][:1], "scores": [1.0], "labels": [1]} for row in ragged_rows(4)]
    rows = [row for place, row in enumerate(rows) if row["documents"] not in [r["documents"] for r in rows[:place]]]
    vectors = vectors_for(rows)
    features, labels = listwise_batch(model, "dense", rows, vectors=vectors)
    targets = [
        vectors.of([row["query"] for row in rows], "query"),
        vectors.of([r["documents"][0] for r in rows], "document"),
    ]
    expected, wanted = gradients(EmbedDistillLoss(model, kind), model, features, torch.from_numpy(np.stack(targets, 1)))
    value, found = gradients(EmbeddingDistillLoss(model, vectors, kind), model, features, labels)
    assert value == pytest.approx(expected, abs=1e-12)
    assert_same(wanted, found, 1e-12)


def test_vectors_ride_with_everything_else(tiny_bert_path: Path) -> None:
    """Scores, gains and preferences are read as if there were no vectors, and these come out as they went in."""
    model = make_student("dense", tiny_bert_path)
    for rows in (ROWS, paired_rows()):
        vectors = vectors_for(rows)
        plain, labels = (ListwiseCollator(model, vectors=v)(rows)["label"] for v in (None, vectors))
        assert labels.shape[2] % 2 == 1
        for name, part in vars(unpack(plain)).items():
            other = getattr(unpack(labels), name)
            assert (part is None) == (other is None), name
            assert part is None or torch.equal(part.nan_to_num(-7), other.nan_to_num(-7)), name
        count = len({text for row in rows for text in row["documents"]})
        queries, documents = vectors_of(labels, [len(rows), count], 32)  # type: ignore[misc]
        assert torch.equal(queries, torch.from_numpy(vectors.of([row["query"] for row in rows], "query")))
        assert len(documents) == count
        assert vectors_of(plain, [len(rows), count], 32) is None
    for size in range(1, 70):
        one = with_vectors(torch.zeros(2, 3, 5), torch.arange(size, dtype=torch.float32)[:, None])
        assert torch.equal(vectors_of(one, [size], 1)[0][:, 0], torch.arange(size, dtype=torch.float32))  # type: ignore[index]


def test_terms_of_a_sum_are_those_alone(tiny_bert_path: Path) -> None:
    """KL, contrast and embeddings on one forward pass, gradient cache and Matryoshka around them."""
    model = make_student("dense", tiny_bert_path).double()
    vectors = vectors_for(ROWS)
    features, labels = listwise_batch(model, "dense", ROWS, vectors=vectors)
    parts = [KLDistillLoss(model), InBatchContrastiveLoss(model), EmbeddingDistillLoss(model, vectors)]
    alone = [gradients(part, model, features, labels)[0] for part in parts]
    named = make_loss(model, "kl+in-batch+embedding", vectors=vectors, mini_batch_size=2)
    values = named([dict(column) for column in features], labels)
    assert [value.item() for value in values.values()] == pytest.approx(alone, abs=1e-9)
    value, found = gradients(named, model, features, labels)
    expected, wanted = gradients(WeightedSumLoss(model, [(1.0, part) for part in parts]), model, features, labels)
    assert value == pytest.approx(expected, abs=1e-9)
    assert_same(wanted, found, 1e-9)
    around = make_loss(model, "in-batch+embedding", vectors=vectors, matryoshka=[16, 8], mini_batch_size=2)
    assert math.isfinite(gradients(around, model, features, labels)[0])


def test_the_learned_projection_is_the_losss_and_kept(tiny_bert_path: Path, tmp_path: Path) -> None:
    """It starts alike in every run, has a gradient, and can be used again; it is no part of the student."""
    model = make_student("dense", tiny_bert_path)
    vectors = vectors_for(ROWS, Numbers(20))
    torch.manual_seed(1)
    loss = EmbeddingDistillLoss(model, vectors)
    torch.manual_seed(2)
    other = EmbeddingDistillLoss(model, vectors)
    layer: Any = loss.upstream.projection  # type: ignore[union-attr]
    assert torch.equal(layer.weight, other.upstream.projection.weight)  # type: ignore[union-attr]
    assert (layer.weight @ layer.weight.T - torch.eye(20)).abs().max() < 1e-5
    batch = listwise_batch(model, "dense", ROWS, vectors=vectors)
    gradients(loss, model, *batch)
    assert layer.weight.grad.abs().max() > 0
    assert not any("projection" in name for name in model.state_dict())
    loss.save_projection(tmp_path / "learned.safetensors")
    assert torch.equal(load_file(tmp_path / "learned.safetensors")["weight"], layer.weight)
    fitted = EmbeddingDistillLoss(model, vectors_for(ROWS, Numbers(48)))
    fitted.save_projection(tmp_path / "fitted.safetensors")
    weight = load_file(tmp_path / "fitted.safetensors")["weight"]
    assert weight.shape == (32, 48)
    assert (weight @ weight.T - torch.eye(32)).abs().max() < 1e-5
    with pytest.raises(ValueError, match="A learned projection takes the student's 32 dimensions"):
        MatryoshkaLoss(model, loss, [32, 8])(*batch)


def test_what_does_not_go_together_is_refused(tiny_bert_path: Path) -> None:
    """Before training, with what to do."""
    model, vectors = make_student("dense", tiny_bert_path), vectors_for(ROWS)
    wide = vectors_for(ROWS, Numbers(48))
    for options, message in (
        ({"projection": "pca"}, "and the student has 32: leave it out|the student has 32: leave it out"),
        ({"distance_metric": "relational", "projection": "pca"}, "need no projection"),
        ({"teacher_temperature": 0.1}, "belongs to distance_metric='relational'"),
        ({"distance_metric": "euclid"}, "must be 'cosine', 'mse', 'l2' or 'relational'"),
    ):
        with pytest.raises(ValueError, match=message):
            EmbeddingDistillLoss(model, vectors, **options)
    with pytest.raises(ValueError, match="a sparse student can learn its relations alone"):
        EmbeddingDistillLoss(make_student("sparse", tiny_bert_path), wide, "cosine")
    assert EmbeddingDistillLoss(make_student("sparse", tiny_bert_path), wide).distance_metric == "relational"
    for kind in ("multi-vector", "cross-encoder"):
        with pytest.raises(ValueError, match="compares single embeddings"):
            EmbeddingDistillLoss(make_student(kind, tiny_bert_path), vectors)
    with pytest.raises(ValueError, match=r"needs the teacher's vectors of each batch"):
        EmbeddingDistillLoss(model, vectors)(*listwise_batch(model, "dense", ROWS))
    with pytest.raises(ValueError, match="no vector of the query"):
        listwise_batch(model, "dense", ragged_rows(seed=5), vectors=vectors)
    with pytest.raises(ValueError, match="Rows of single texts have nothing but a teacher's embeddings"):
        ListwiseCollator(model)([{"text": "a", "side": "document"}])
    with pytest.raises(ValueError, match="learns from a teacher's embeddings: name it"):
        make_loss(model, "kl+embedding")
    with pytest.raises(ValueError, match=r"kl\+embedding does"):
        make_loss(model, "kl", vectors=vectors)
    loss: Any = make_loss(model, "kl+embedding", vectors=wide, teacher_temperature=2.0, distance_metric="mse")
    assert [loss.losses[0].teacher_temperature, loss.losses[1].distance_metric] == [2.0, "mse"]
    assert loss.get_config_dict()["EmbeddingDistillLoss"] == {
        "weight": 1.0,
        "teacher": "numbers",
        "teacher_dimension": 48,
        "distance_metric": "mse",
        "projection": "pca",
    }
