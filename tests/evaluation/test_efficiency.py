"""Sizes must be exact and speeds plausible, for every model class."""

from __future__ import annotations

from typing import Any

import pytest
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SparseEncoder
from transformers import BertForMaskedLM, BertForSequenceClassification, BertModel

from st_wkl.evaluation import evaluate
from st_wkl.evaluation.efficiency import measure_efficiency, parameter_counts
from tests.helpers.tiny import DOCUMENTS, QUERIES, collection

TEXTS = (list(QUERIES.values()), list(DOCUMENTS.values()))


def test_a_dense_index_is_documents_times_dimensions(student: Any) -> None:
    """The number that capacity is planned with; it must stand in the results file, beside the scores."""
    ours = evaluate(student, collection(), efficiency=True, show_progress=False)
    found = ours.model["efficiency"]
    assert found["index_bytes"] == 12 * 256 * 4
    assert found["dimension"] == 256
    assert found["queries_per_second"] > 0
    assert found["documents_per_second"] > 0
    assert found["parameters"] == ours.model["parameters"]
    assert found["active_parameters"] == 0, "a static model looks everything up"
    student.truncate_dim = 64
    assert measure_efficiency(student, *TEXTS)["index_bytes"] == 12 * 64 * 4


def test_a_sparse_index_is_its_entries(tiny_bert: Any) -> None:
    """A sparse model's size is what it fires, not its vocabulary."""
    model = SparseEncoder(str(tiny_bert(BertForMaskedLM)), device="cpu")
    found = measure_efficiency(model, *TEXTS, repeats=1)
    vectors = model.encode_document(TEXTS[1], convert_to_sparse_tensor=False)
    assert found["index_bytes"] == int((vectors != 0).sum()) * 8
    assert found["dimension"] == vectors.shape[1]


def test_a_multi_vector_index_is_its_tokens(tiny_bert: Any) -> None:
    """Late interaction costs a vector per token, which is why it is expensive."""
    model = MultiVectorEncoder(str(tiny_bert(BertModel)), device="cpu")
    found = measure_efficiency(model, *TEXTS, repeats=1)
    tokens = [len(vectors) for vectors in model.encode_document(TEXTS[1])]
    assert found["index_bytes"] == sum(tokens) * found["dimension"] * 4


def test_a_cross_encoder_has_no_index(tiny_bert: Any) -> None:
    """The teacher's cost is pairs; parameters that are looked up cost nothing."""
    model = CrossEncoder(str(tiny_bert(BertForSequenceClassification)), device="cpu")
    found = measure_efficiency(model, *TEXTS, repeats=2)
    assert found["pairs_per_second"] > 0
    assert "index_bytes" not in found
    counts = parameter_counts(model)
    assert counts["parameters"] - counts["active_parameters"] == sum(
        weight.numel() for name, weight in model.named_parameters() if "embeddings" in name and "LayerNorm" not in name
    )


def test_nothing_to_measure_on_is_refused(student: Any) -> None:
    """A speed over no text would be infinite."""
    with pytest.raises(ValueError, match="at least one query and one document"):
        measure_efficiency(student, [], ["a"])
    with pytest.raises(ValueError, match="both must be at least 1"):
        measure_efficiency(student, ["a"], ["a"], repeats=0)
    with pytest.raises(ValueError, match="BM25 has none"):
        evaluate("bm25", collection(), efficiency=True, show_progress=False)
