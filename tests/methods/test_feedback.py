"""The retriever that teaches itself with its query expanded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from st_wkl.data.teachers import score_lists
from st_wkl.methods.collective import FeedbackTeacher, rocchio

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

DOCUMENTS = ["A cat sleeps.", "A kitten plays.", "The dog barks.", "Interest rates rise.", "Stocks fall."]


@pytest.fixture(scope="module")
def student(static_student_path: Path) -> SentenceTransformer:
    """Return a static retriever."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(static_student_path), device="cpu")


def test_rocchio_is_query_plus_weighted_mean() -> None:
    """By hand, with and without shares, and without feedback."""
    query, feedback = np.array([1.0, 0.0]), np.array([[0.0, 1.0], [0.0, 3.0]])
    assert rocchio(query, feedback).tolist() == [1.0, 2.0]
    assert rocchio(query, feedback, weight=0.5, shares=[3, 1]).tolist() == [1.0, 0.75]
    assert rocchio(query, feedback[:0]).tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="do not fit"):
        rocchio(query, np.zeros((2, 3)))
    with pytest.raises(ValueError, match="as many shares"):
        rocchio(query, feedback, shares=[1.0])


def test_scores_are_those_of_the_expanded_query(student: SentenceTransformer) -> None:
    """Computed again by hand from the model's embeddings."""
    found = FeedbackTeacher(student, feedback_documents=2, weight=0.7).score_lists(
        [("cats", DOCUMENTS)], show_progress=False
    )[0]
    query, documents = student.encode_query("cats"), student.encode_document(DOCUMENTS)
    plain = np.asarray(student.similarity(query, documents))[0]
    best = np.argsort(-plain)[:2]
    expanded = query + 0.7 * documents[best].mean(axis=0)
    np.testing.assert_allclose(found, np.asarray(student.similarity(expanded, documents))[0], atol=1e-5)
    assert found.dtype == np.float32
    assert np.abs(found - plain).max() > 0.01


def test_weight_zero_is_the_plain_retriever(student: SentenceTransformer) -> None:
    """The control experiment must be exactly that."""
    found = score_lists(FeedbackTeacher(student, weight=0.0), [("cats", DOCUMENTS)], show_progress=False)[0]
    plain = student.similarity(student.encode_query("cats"), student.encode_document(DOCUMENTS))
    np.testing.assert_allclose(found, np.asarray(plain)[0], atol=1e-6)


def test_shares_by_similarity(student: SentenceTransformer) -> None:
    """A temperature near 0 listens to the best document only."""
    lists = [("cats", DOCUMENTS)]
    sharp = FeedbackTeacher(student, temperature=1e-4).score_lists(lists, show_progress=False)[0]
    one = FeedbackTeacher(student, feedback_documents=1).score_lists(lists, show_progress=False)[0]
    np.testing.assert_allclose(sharp, one, atol=1e-4)


def test_lists_of_all_sizes(student: SentenceTransformer) -> None:
    """Ragged, single and empty lists keep their shape, and a list does not depend on the lists beside it."""
    teacher = FeedbackTeacher(student)
    lists = [("cats", DOCUMENTS), ("cats", DOCUMENTS[:1]), ("money", []), ("money", DOCUMENTS[3:])]
    found = teacher.score_lists(lists, show_progress=False)
    assert [len(scores) for scores in found] == [5, 1, 0, 2]
    alone = teacher.score_lists(lists[3:], show_progress=False)[0]
    np.testing.assert_allclose(found[3], alone, atol=1e-6)
    assert [len(scores) for scores in teacher.score_lists([("money", [])], show_progress=False)] == [0]
    assert teacher.score_lists([], show_progress=False) == []


def test_identity_changes_with_weights_and_settings(static_student_path: Path) -> None:
    """After a round of training the retriever is another teacher."""
    import torch
    from sentence_transformers import SentenceTransformer

    student = SentenceTransformer(str(static_student_path), device="cpu")
    before = FeedbackTeacher(student).identity
    assert FeedbackTeacher(student).identity == before
    assert FeedbackTeacher(student, feedback_documents=5).identity != before
    assert str(static_student_path) not in str(before)
    with torch.no_grad():
        next(student.parameters())[0, 0] += 1
    assert FeedbackTeacher(student).identity["revision"] != before["revision"]


def test_bad_numbers_are_refused(student: SentenceTransformer) -> None:
    """At once, not after encoding."""
    for options in ({"feedback_documents": 0}, {"weight": -1.0}, {"temperature": 0.0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="must be"):
            FeedbackTeacher(student, **options)  # type: ignore[arg-type]
