"""Collective labels of a late-interaction student, against a plain loop, and through builder and loss."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import MultiVectorEncoder
from sklearn.cluster import KMeans

from st_wkl.data.selection import Selection
from st_wkl.losses import WeightedKLDistillationLoss
from st_wkl.methods.collective import TokenFeedbackTeacher, centroid_expansion
from tests.data.test_builder import DOCUMENTS, HAND, build, collection
from tests.helpers.students import listwise_batch, make_student

TEXTS = list(DOCUMENTS.values())


@pytest.fixture(scope="module")
def saved(tiny_bert_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a student with a projection of its own; a new one is no teacher."""
    folder = tmp_path_factory.mktemp("multi-vector")
    make_student("multi-vector", tiny_bert_path).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def student(saved: Path) -> MultiVectorEncoder:
    return make_student("multi-vector", saved).eval()


def plain_scores(model: Any, query: str, documents: list[str], feedback: int, clusters: int, kept: int) -> list[float]:
    """The published recipe, step by step."""
    frequency: dict[int, int] = {}
    for text in TEXTS:
        for token_id in set(model.tokenizer(text)["input_ids"]):
            frequency[token_id] = frequency.get(token_id, 0) + 1
    asked = model.encode_query([query])[0].double()
    found = [vectors.double() for vectors in model.encode_document(documents)]

    def score(vectors: torch.Tensor, document: torch.Tensor) -> float:
        return sum(max(float(vector @ token) for token in document) for vector in vectors)

    plain = [score(asked, document) for document in found]
    best = sorted(range(len(documents)), key=lambda place: -plain[place])[:feedback]
    ids = [model.tokenizer(document)["input_ids"] for document in documents]
    tokens = [pair for place in best for pair in zip(found[place], ids[place], strict=True)]
    matrix = np.stack([vector.float().numpy() for vector, _ in tokens])
    centroids = KMeans(clusters, n_init=1, random_state=0).fit(matrix).cluster_centers_
    expansion = []
    for centroid in centroids:
        nearest = min(range(len(tokens)), key=lambda place: float(((matrix[place] - centroid) ** 2).sum()))
        idf = math.log((len(TEXTS) + 1) / (frequency[tokens[nearest][1]] + 1))
        expansion.append((idf, torch.from_numpy(centroid).double()))
    expansion = sorted(expansion, key=lambda pair: -pair[0])[:kept]
    return [
        value + sum(idf * score(centroid[None], document) for idf, centroid in expansion)
        for value, document in zip(plain, found, strict=True)
    ]


def test_scores_equal_the_plain_recipe(student: MultiVectorEncoder) -> None:
    """Clusters, idf and weights can each be off by one and still give plausible scores."""
    teacher = TokenFeedbackTeacher(student, TEXTS, feedback_documents=2, clusters=6, expansions=4)
    found = teacher.score_lists([("what animal purrs", TEXTS[:5])], show_progress=False)[0]
    expected = plain_scores(student, "what animal purrs", TEXTS[:5], 2, 6, 4)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert found.dtype == np.float32


def test_weight_zero_is_the_plain_retriever(student: MultiVectorEncoder) -> None:
    """The control experiment must be exactly that, whichever way the model normalises."""
    lists = [("purr", TEXTS), ("sing", TEXTS[:1]), ("none", []), ("purr", TEXTS[3:])]
    for similarity in ("maxsim", "meanmaxsim"):
        student.similarity_fn_name = similarity  # type: ignore[assignment]
        found = TokenFeedbackTeacher(student, TEXTS, weight=0).score_lists(lists, show_progress=False)
        assert [len(scores) for scores in found] == [len(texts) for _, texts in lists]
        expected = student.similarity(student.encode_query(["purr"]), student.encode_document(TEXTS))[0]
        np.testing.assert_allclose(found[0], expected.numpy(), rtol=1e-5)
        again = TokenFeedbackTeacher(student, TEXTS).score_lists(lists[3:], show_progress=False)[0]
        whole = TokenFeedbackTeacher(student, TEXTS).score_lists(lists, show_progress=False)[3]
        np.testing.assert_allclose(again, whole, rtol=1e-5)
    student.similarity_fn_name = "maxsim"


def test_rare_words_expand_the_query() -> None:
    """Centroids of frequent tokens would drown the query; fewer tokens than clusters must not fail."""
    tokens = np.eye(3)[[0, 0, 1, 2]]
    vectors, weights = centroid_expansion(tokens, np.array([5, 5, 6, 7]), {5: 0.0, 6: 1.5}, expansions=2)
    assert vectors[0].tolist() == [0, 1, 0]
    assert weights.tolist() == [1.5, 0.0]
    assert centroid_expansion(np.empty((0, 4)), np.empty(0), {})[0].shape == (0, 4)


def test_collective_labels_end_to_end(saved: Path) -> None:
    """Feedback scores, positives raised to the best, τ_t 0.25 and KL: all the stages fit together."""
    model = make_student("multi-vector", saved)
    teacher = TokenFeedbackTeacher(model, collection().documents.values(), clusters=4)
    dataset = build(teacher=teacher, candidates=HAND, selection=Selection(label_correction="raise_positives"))
    for row in dataset.train:
        assert row["scores"][0] == max(row["scores"]), "positives come first in a row"
    assert dataset.provenance["teacher"]["kind"] == "token feedback"
    loss = WeightedKLDistillationLoss(model.train(), gamma=0, alpha=0, teacher_temperature=0.25)
    value = loss(*listwise_batch(model, "multi-vector", dataset.to_lists().to_list()))
    value.backward()
    assert value.isfinite()


def test_identity_and_bad_input(student: MultiVectorEncoder, tiny_bert_path: Path) -> None:
    """Another idf is another teacher; what cannot work is said at once."""
    identity = TokenFeedbackTeacher(student, TEXTS).identity
    assert TokenFeedbackTeacher(student, TEXTS).identity == identity
    assert TokenFeedbackTeacher(student, TEXTS[1:]).identity != identity
    assert TokenFeedbackTeacher(student, TEXTS, clusters=5).identity != identity
    with pytest.raises(TypeError, match="has no token embeddings"):
        TokenFeedbackTeacher(make_student("dense", tiny_bert_path), TEXTS)
    with pytest.raises(ValueError, match="idf needs documents"):
        TokenFeedbackTeacher(student, [])
    for options in ({"feedback_documents": 0}, {"weight": -1.0}, {"clusters": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="must be"):
            TokenFeedbackTeacher(student, TEXTS, **options)  # type: ignore[arg-type]
