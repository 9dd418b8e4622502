"""Coherence over paraphrases, and the asymmetric student that keeps its teacher's document encoder."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.data_collator import BaseDataCollator
from sentence_transformers.sentence_transformer.losses import EmbedDistillLoss
from sentence_transformers.sentence_transformer.modules import Router

from st_wkl.functional import coherence
from st_wkl.losses import CoherenceLoss, WeightedKLDistillationLoss
from st_wkl.methods.paraphrases import add_paraphrases
from tests.helpers.students import (
    assert_same,
    features_and_labels,
    gradients,
    make_student,
    moved,
    ragged_rows,
    rows_with_paraphrases,
    trained,
    weights,
)


def test_coherence_equals_a_plain_loop() -> None:
    """A margin against the wrong document would still fall during training."""
    generator = torch.Generator().manual_seed(0)
    query, paraphrase = (torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    documents = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    mask = torch.tensor([True, False, True])
    cos = torch.nn.functional.cosine_similarity
    distances, margins = [], []
    for row in (0, 2):
        q, other = query[row] / query[row].norm(), paraphrase[row] / paraphrase[row].norm()
        distances.append(((q - other) ** 2).sum())
        for place in range(6):
            if place != row:
                first, second = (
                    cos(text[row], documents[row], dim=0) - cos(text[row], documents[place], dim=0)
                    for text in (query, paraphrase)
                )
                margins.append((first - second) ** 2)
    found = coherence(query, paraphrase, documents, mask=mask)
    assert found[0].item() == pytest.approx(torch.stack(distances).mean().item(), abs=1e-12)
    assert found[1].item() == pytest.approx(torch.stack(margins).mean().item(), abs=1e-12)
    query.requires_grad_()
    assert torch.autograd.gradcheck(lambda q: sum(coherence(q, paraphrase, documents, mask=mask)), (query,))


def test_missing_paraphrases_count_in_nothing() -> None:
    """Whatever stands in their place, a text of length 0 included; and a batch without any must not divide by zero."""
    query = torch.eye(2, requires_grad=True)
    bad = torch.tensor([[0.0, 0.0], [float("nan"), 1.0]], requires_grad=True)
    found = coherence(query, bad, torch.eye(2), mask=torch.tensor([False, False]))
    sum(found).backward()  # type: ignore[union-attr]
    assert [term.item() for term in found] == [0, 0]
    assert query.grad is not None
    assert bool(query.grad.isfinite().all())
    assert bad.grad is not None
    assert bool((bad.grad == 0).all())
    with pytest.raises(ValueError, match="the paraphrase embedding of row 0 has length 0"):
        coherence(query, bad, torch.eye(2), mask=torch.tensor([True, False]))
    with pytest.raises(ValueError, match="coherence needs"):
        coherence(query, torch.eye(3), torch.eye(2))
    alone = coherence(query[:1], torch.eye(2)[1:], torch.eye(2)[:1])
    assert alone[1].item() == 0


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_the_loss_trains_and_counts(kind: str, tiny_bert_path: Path, tmp_path: Path) -> None:
    """Through the stock trainer, with and without the gradient cache, some paraphrases missing."""
    model = make_student(kind, tiny_bert_path).double()
    rows = rows_with_paraphrases(missing=(1, 3))
    batch = features_and_labels(BaseDataCollator(model.preprocess), rows, kind, model)
    loss = CoherenceLoss(model)
    value, plain = gradients(loss, model, *batch)
    assert loss.rows_without_paraphrase == 2
    again, cached = gradients(CoherenceLoss(model, mini_batch_size=2), model, *batch)
    assert again == pytest.approx(value, abs=1e-5)
    assert_same(plain, cached, 1e-5)
    # What stands in the place of a missing paraphrase does not matter.
    rows[1]["paraphrase"] = rows[3]["paraphrase"] = "something else entirely"
    other = gradients(loss, model, *features_and_labels(BaseDataCollator(model.preprocess), rows, kind, model))
    assert other[0] == pytest.approx(value, abs=1e-9)
    model = make_student(kind, tiny_bert_path)
    before = weights(model)
    trained(kind, model, CoherenceLoss(model), tmp_path, Dataset.from_list(rows), data_collator=None)
    assert moved(before, weights(model))


def test_paraphrases_become_a_column() -> None:
    """The order of columns decides what a text is; missing ones are counted, not made up in silence."""
    data = Dataset.from_dict(
        {
            "query": ["a b", "c", "d"],
            "positive": ["x", "y", "z"],
            "negative_1": ["u", "v", "w"],
            "label": [[1.0, 0.0]] * 3,
        }
    )
    with pytest.warns(UserWarning, match="2 of 3 queries have no paraphrase"):
        found = add_paraphrases(data, {"a b": "b a", "c": "c", "e": "f"})
    assert found.column_names == ["query", "paraphrase", "positive", "negative_1", "label"]
    assert found["paraphrase"][:] == ["b a", "c", "d"]
    assert found["label"][:] == [1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="None of 3 queries has a paraphrase"):
        add_paraphrases(data, {})
    with pytest.raises(ValueError, match="one of them must be 'query'"):
        add_paraphrases(data.remove_columns("query"), {"a b": "b a"})


def test_bad_input(tiny_bert_path: Path) -> None:
    """Said when it is put together, or with the first batch."""
    model = make_student("dense", tiny_bert_path)
    with pytest.raises(ValueError, match="which a MultiVectorEncoder does not have"):
        CoherenceLoss(make_student("multi-vector", tiny_bert_path))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="margin_weight must be"):
        CoherenceLoss(model, margin_weight=-1.0)
    with pytest.raises(ValueError, match="temperature must be"):
        CoherenceLoss(model, temperature=0.0)
    with pytest.raises(ValueError, match="expects the columns query, paraphrase, positive"):
        CoherenceLoss(model).compute_loss_from_embeddings([torch.ones(2, 4)] * 2, None)
    with pytest.raises(ValueError, match="one label per row"):
        CoherenceLoss(model).compute_loss_from_embeddings([torch.ones(2, 4)] * 3, torch.ones(2, 3))


def asymmetric(teacher: SentenceTransformer, query_encoder: SentenceTransformer) -> SentenceTransformer:
    """A student with an encoder of its own for queries, and its teacher's, frozen, for documents."""
    frozen = copy.deepcopy(teacher).requires_grad_(False)
    return SentenceTransformer(modules=[Router.for_query_document(list(query_encoder), list(frozen))])


def test_an_asymmetric_student_keeps_the_documents(tiny_bert_path: Path, tmp_path: Path) -> None:
    """Documents of the teacher need no new index: only queries are learned, by embedding and by score."""
    teacher = make_student("dense", tiny_bert_path)
    query_encoder = make_student("dense", tiny_bert_path)
    with torch.no_grad():
        for parameter in query_encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    student = asymmetric(teacher, query_encoder)
    rows = ragged_rows(9)
    before = student.encode_document(rows[0]["documents"]).copy()
    texts = [row["query"] for row in rows]

    def far() -> float:
        return float(np.abs(student.encode_query(texts) - teacher.encode_query(texts)).mean())

    start = far()
    data = Dataset.from_dict({"query": texts, "label": teacher.encode_query(texts).tolist()})
    arguments = {"router_mapping": {"query": "query"}, "max_steps": 20}
    trained("dense", student, EmbedDistillLoss(student), tmp_path, data, data_collator=None, arguments=arguments)
    assert far() < start
    queries = weights(student)
    trained("dense", student, WeightedKLDistillationLoss(student), tmp_path, Dataset.from_list(rows))
    assert moved(queries, weights(student)), "the score term goes on from there"
    np.testing.assert_array_equal(student.encode_document(rows[0]["documents"]), before)
    np.testing.assert_allclose(before, teacher.encode_document(rows[0]["documents"]), atol=1e-6)
