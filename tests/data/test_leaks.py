"""Leaks: what a training set knows of a test split is found, named and, on request, taken away."""

from __future__ import annotations

import itertools
import json
import random
import warnings
from pathlib import Path

import pytest
from datasets import Dataset

from st_wkl.data.collection import Collection
from st_wkl.data.dataset import DistillationDataset, features
from st_wkl.data.leaks import document_disjoint, find_leaks
from st_wkl.text import jaccard, near_texts, text_words

DOCUMENTS = {
    "cat": "Cats purr.",
    "copy": "Cats  purr. ",
    "dog": "Dogs bark.",
    "bird": "Birds sing.",
    "fish": "Silence.",
}
QUERIES = {
    "train1": "Which animal purrs?",
    "train2": "who barks",
    "train3": "a b c d e f g h i j k l m n o p q r s",
    "test1": "which  ANIMAL purrs?",
    "test2": "barks who",
    "test3": "a b c d e f g h i j k l m n o p q r t",
    "test4": "quiet animals",
}
TRAIN = {"train1": {"cat": 1}, "train2": {"dog": 2, "bird": 1}, "train3": {"bird": 1, "fish": 0}}
TEST = {"test1": {"copy": 1, "fish": 1}, "test2": {"bird": 1, "dog": 0}, "test3": {"fish": 1}, "test4": {"fish": 2}}


def collection() -> Collection:
    """Return a collection with every kind of leak."""
    return Collection("mine", dict(DOCUMENTS), dict(QUERIES), {"train": TRAIN, "test": TEST})


def test_every_kind_of_leak_is_found() -> None:
    """Equal but for case and spaces, other word order, one word of twenty, and a copy of a positive."""
    report = find_leaks("train", collection())
    assert report.equal_queries == {"test1": ["train1"]}
    assert report.near_queries == {"test2": {"train2": 1.0}, "test3": {"train3": 0.9}}
    assert report.shared_documents == {"test1": ["copy"], "test2": ["bird"]}, "gain 0 on either side is no leak"
    assert (report.share_of_queries, report.share_of_judgements) == (2 / 4, 2 / 5)
    assert "2 (50.0%) have a relevant document" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["shared_judgements"] == 2
    assert find_leaks("train", collection(), near=0.91).near_queries == {"test2": {"train2": 1.0}}


def test_a_clean_split_is_clean() -> None:
    """The report is false where there is nothing to report, and does not divide by nothing."""
    clean = Collection(
        "mine", dict(DOCUMENTS), dict(QUERIES), {"train": {"train1": {"cat": 1}}, "test": {"test4": {"fish": 1}}}
    )
    assert not find_leaks("train", clean)
    unjudged = Collection(
        "mine", dict(DOCUMENTS), dict(QUERIES), {"train": {"train1": {"cat": 1}}, "test": {"test4": {"fish": 0}}}
    )
    assert find_leaks("train", unjudged).share_of_queries == 0


def test_datasets_and_other_collections_are_compared_by_text() -> None:
    """Ids of two collections mean nothing to each other: the same id may be another text, and the other way round."""
    other = Collection(
        "other", {"fish": "Cats purr.", "x": "Rain falls."}, {"test4": "rain"}, {"dev": {"test4": {"fish": 1}}}
    )
    assert find_leaks((other, "dev"), collection()).shared_documents == {"test1": ["copy"]}
    dataset = DistillationDataset(
        Dataset.from_list(
            [{"query_id": "q", "document_ids": ["1", "2"], "scores": [1.0, 0.0], "labels": [1, 0]}],
            features=features("train"),
        ),
        Dataset.from_list([{"query_id": "q", "text": "quiet animals"}, {"query_id": "unused", "text": "barks who"}]),
        Dataset.from_list([{"document_id": "1", "text": "Silence."}, {"document_id": "2", "text": "Birds sing."}]),
        {"collection": {"name": "hub/set"}, "split": "train"},
    )
    report = find_leaks(dataset, collection())
    assert report.training == "hub/set, train"
    assert report.equal_queries == {"test4": ["q"]}, "a query without a row is not trained on"
    assert report.shared_documents == {"test1": ["fish"], "test3": ["fish"], "test4": ["fish"]}


@pytest.mark.parametrize("near", [0.3, 0.5, 0.75, 0.9, 1.0])
def test_near_texts_misses_nothing(near: float) -> None:
    """The index must find what comparing all pairs finds; a pair that it misses is a leak that nobody sees."""
    rng = random.Random(7)
    words = [f"w{i}" for i in range(14)]
    texts = {f"t{i}": " ".join(rng.choices(words, k=rng.randint(1, 12))) for i in range(120)}
    others = {f"o{i}": " ".join(rng.choices(words, k=rng.randint(1, 12))) for i in range(120)}
    _, found = near_texts(texts, others, near)
    expected = {
        (a, b)
        for a, b in itertools.product(texts, others)
        if jaccard(frozenset(text_words(texts[a])), frozenset(text_words(others[b]))) >= near and texts[a] != others[b]
    }
    assert {(a, b) for a, hits in found.items() for b in hits} == expected
    assert expected


def test_texts_without_a_letter_are_compared_too() -> None:
    """Queries such as "???" exist; two empty sets of words must not make all of them near."""
    assert near_texts({"a": "???", "b": "!!"}, {"c": "???", "d": "c++"}) == ({"a": ["c"]}, {})


def test_document_disjoint_keeps_the_test_side() -> None:
    """No relevant document on both sides, copies included, and none that may be mined as a negative."""
    with pytest.warns(UserWarning, match=r"3 of 4 relevant judgements and 2 of 3 queries of split 'train'"):
        disjoint = document_disjoint(collection())
    assert disjoint.qrels == {"train": {"train2": {"dog": 2, "bird": -1}}, "test": TEST}
    assert not find_leaks("train", disjoint).shared_documents
    assert collection().qrels["train"] == TRAIN


def test_document_disjoint_can_share_out() -> None:
    """Where all documents are shared, a seeded share for each side leaves both something, without any overlap."""
    documents = {f"d{i}": f"text {i}" for i in range(200)}
    queries = {f"{side}{i}": f"{side} {i}" for side in ("a", "b") for i in range(200)}
    qrels = {split: {f"{side}{i}": {f"d{i}": 1} for i in range(200)} for split, side in (("train", "a"), ("test", "b"))}
    full = Collection("full", documents, queries, qrels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, again = (document_disjoint(full, test_share=0.3, seed=1) for _ in range(2))
        other = document_disjoint(full, test_share=0.3, seed=2)
    assert first.qrels == again.qrels != other.qrels
    assert 30 <= len(first.qrels["test"]) <= 90
    assert len(first.qrels["test"]) + len(first.qrels["train"]) == 200
    assert not find_leaks("train", first)
    with pytest.raises(ValueError, match="no query is left"):
        document_disjoint(full)


def test_arguments_that_cannot_work() -> None:
    """Each is refused with what is wrong."""
    with pytest.raises(ValueError, match="near is a Jaccard coefficient"):
        find_leaks("train", collection(), near=0)
    with pytest.raises(ValueError, match="has no split 'dev'"):
        find_leaks("dev", collection())
    with pytest.raises(ValueError, match="both 'test'"):
        document_disjoint(collection(), "test", "test")
    with pytest.raises(ValueError, match="from 0 to 1"):
        document_disjoint(collection(), test_share=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "equal", "judgements", "queries"),
    [("scifact", 2, 0.637, 196), ("nfcorpus", 4, 0.999, 323), ("insuranceqa", 6, 0.030, 70)],
)
def test_real_collections(shared_data: Path, name: str, equal: int, judgements: float, queries: int) -> None:
    """The known leaks of real collections, counted before by other means."""
    real = Collection.from_beir(shared_data / name)
    report = find_leaks("train", real)
    assert len(report.equal_queries) == equal
    assert report.share_of_judgements == pytest.approx(judgements, abs=0.0006)
    assert len(report.shared_documents) == queries
    with pytest.warns(UserWarning, match="are taken back"):
        assert not find_leaks("train", document_disjoint(real)).shared_documents
