"""The hashes of training texts decide which test queries count as unseen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from st_wkl.data.dataset import DistillationDataset, features
from st_wkl.data.texts import EmbeddingDataset
from st_wkl.evaluation.results import FILE_NAME
from st_wkl.publish.hub import ROOT_FILE
from st_wkl.record import EXPOSURE_FILE, RECORD_FILE, Exposure
from st_wkl.text import text_hash


def a_dataset() -> DistillationDataset:
    from datasets import Dataset

    tables = {
        "train": {
            "query_id": ["q"],
            "document_ids": [["a", "b"]],
            "scores": [np.array([1.0, 0.0], np.float32)],
            "labels": [[1, 0]],
        },
        "queries": {"query_id": ["q"], "text": ["a query"]},
        "documents": {"document_id": ["a", "b"], "text": ["the answer", "no answer"]},
    }
    return DistillationDataset(
        **{name: Dataset.from_dict(rows, features=features(name)) for name, rows in tables.items()}, provenance={}
    )


def test_positives_and_queries_survive_a_round_trip_without_their_text(tmp_path):
    """Only positives count as seen, and no text may leave with the student."""
    exposure = Exposure.of(a_dataset())
    exposure.save(tmp_path)
    assert Exposure.load(tmp_path) == exposure
    assert exposure.positives == {text_hash("the  answer\n")}
    assert exposure.queries == {text_hash("a query")}
    assert "answer" not in (tmp_path / EXPOSURE_FILE).read_text()


def test_what_was_shown_as_good_without_a_judgement_counts_as_seen():
    """A student of unjudged lists, or of embeddings alone, was said to have seen no document of the test queries."""
    dataset = a_dataset()
    dataset = replace(dataset, train=dataset.train.map(lambda row: {"labels": [0, 0], "scores": [0.0, 1.0]}))
    assert Exposure.of(dataset).positives == {text_hash("no answer")}, "the teacher's best"
    texts = Exposure.of(EmbeddingDataset.of(["what purrs", "Cats purr."]))
    assert texts.queries == texts.positives == {text_hash("what purrs"), text_hash("Cats purr.")}
    sides = Exposure.of(EmbeddingDataset.of(["Cats purr."], ["what purrs"]))
    assert (sides.queries, sides.positives) == ({text_hash("what purrs")}, {text_hash("Cats purr.")})


def test_a_model_that_was_not_distilled_has_no_exposure(tmp_path):
    """Such models evaluate as they are, without groups."""
    assert Exposure.load(tmp_path) is None


@pytest.mark.parametrize("content", ["", "{}", '{"format": 99, "queries": [], "positives": []}', "[1]"])
def test_a_damaged_file_is_an_error_not_an_unexposed_student(tmp_path, content):
    """A truncated file that read as "nothing seen" would sell adaptation as generalisation."""
    (tmp_path / EXPOSURE_FILE).write_text(content)
    with pytest.raises(ValueError, match="damaged or from another version"):
        Exposure.load(tmp_path)


def test_a_push_takes_the_hashes_along():
    """Who evaluates a student from the Hub needs them to tell seen from unseen, without the training data."""
    assert all(ROOT_FILE.fullmatch(name) for name in (EXPOSURE_FILE, RECORD_FILE, FILE_NAME))
