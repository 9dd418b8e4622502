"""What is no negative and no result: the query's own document, and what answers another query of the same words."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from sentence_transformers import SentenceTransformer

from st_wkl.data.builder import DistillationDatasetBuilder
from st_wkl.data.candidates import bm25_candidates
from st_wkl.data.collection import Collection
from st_wkl.data.dense import retriever_candidates
from st_wkl.data.teachers import CallableTeacher
from st_wkl.evaluation import evaluate, evaluate_run
from st_wkl.evaluation.tasks import CollectionTask
from st_wkl.training.dev import GradedEvaluator

WORDS = "river stone garden market winter engine school planet letter bridge doctor forest".split()  # noqa: SIM905
TEACHER = CallableTeacher(lambda query, text: float(len({*query.split()} & {*text.split()})), name="t", version="1")


def arguments(**options: Any) -> Collection:
    """Return a collection whose queries are documents of the same id, as sets of arguments are."""
    own = {f"x{i}": f"{WORDS[i]} {WORDS[(5 * i + 3) % 12]} {WORDS[(7 * i + 1) % 12]} are good" for i in range(12)}
    counter = {f"{key}-c": text.replace("are good", "do harm") for key, text in own.items()}
    qrels = {"train": {key: {f"{key}-c": 1} for key in own}}
    return Collection("arguments", {**own, **counter}, own, qrels, **options)


def build(collection: Collection, **options: Any) -> list[Any]:
    builder = DistillationDatasetBuilder(
        collection, TEACHER, num_negatives=4, store=":memory:", against=None, **options
    )
    return list(builder.build(False).train)


def test_the_querys_own_document_is_left_out_everywhere(static_student_path: Path) -> None:
    """It was the best result of each query, and the hardest negative of each list, the teacher's best."""
    mine = arguments()
    with pytest.warns(UserWarning, match="12 of 12 queries of 'arguments' are documents of the same id and text"):
        assert mine.leaves_out_own
    student = SentenceTransformer(str(static_student_path), device="cpu")
    for found in (bm25_candidates(mine, top_k=3, show_progress=False), retriever_candidates(mine, student, top_k=3)):
        assert {len(hits) for hits in found.values()} == {3}
        assert not any(hit.document_id == query for query, hits in found.items() for hit in hits)
    everything = {query: dict.fromkeys(mine.documents, 1.0) for query in mine.queries}
    for given in (None, bm25_candidates(arguments(ignore_identical_ids=False), show_progress=False)):
        assert not any(row["query_id"] in row["document_ids"] for row in build(mine, candidates=given))
    task = CollectionTask(arguments(ignore_identical_ids=False), "train")
    kept = evaluate("bm25", task, show_progress=False).ndcg_at_10
    task.ignore_identical_ids = True  # what MTEB's own tasks say
    right = evaluate("bm25", task, show_progress=False).ndcg_at_10
    assert evaluate("bm25", mine, split="train", show_progress=False).ndcg_at_10 == right > kept
    run = {query: {**hits, query: 2.0, f"{query}-c": 1.5} for query, hits in everything.items()}
    assert evaluate_run(run, mine, split="train", name="run").ndcg_at_10 == 1.0
    evaluated = {flag: GradedEvaluator.of(arguments(ignore_identical_ids=flag), "train") for flag in (True, False)}
    scores = {flag: one(student)["train_ndcg_at_10"] for flag, one in evaluated.items()}
    assert scores[True] > scores[False]
    assert evaluated[True].fingerprint != evaluated[False].fingerprint
    first = evaluate(student, mine, split="train", first_stage="bm25", top_k=2, show_progress=False).task()
    assert first.metrics["recall_at_10"] == 1.0


def test_an_option_decides_and_has_an_identity_of_its_own() -> None:
    """Numbers with and without the own document must not be compared, nor lists of one be taken for the other's."""
    kept = arguments(ignore_identical_ids=False)
    assert any(row["query_id"] in row["document_ids"] for row in build(kept))
    assert kept.fingerprint != arguments(ignore_identical_ids=True).fingerprint == arguments().fingerprint
    plain = Collection(
        "mine", {"a": "cats", "b": "dogs", "c": "birds"}, {"a": "who purrs", "b": "dogs", "q": "who flies"}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not plain.leaves_out_own  # one id of three with its text is no such collection


def test_queries_of_the_same_words_share_their_judgements() -> None:
    """The judged document of one was a negative, label 0, of the other, in lists and so in the batch."""
    documents = {f"d{i}": f"topic{i % 3} note item{i}" for i in range(20)}
    queries = {"a": "Topic1 item1", "b": "topic1  ITEM1", "c": "topic2 item2"}
    mine = Collection(
        "twins", documents, queries, {"train": {"a": {"d1": 1}, "b": {"d4": 2, "d7": -1}, "c": {"d2": 1}}}
    )
    with pytest.warns(UserWarning, match="2 queries of split 'train' of 'twins' have the words of another one"):
        rows = build(mine)
    labels = {row["query_id"]: dict(zip(row["document_ids"], row["labels"], strict=True)) for row in rows}
    for query in "ab":
        assert {key: gain for key, gain in labels[query].items() if gain} == {"d4": 2, "d1": 1}
        assert "d7" not in labels[query]
    assert {key for key, gain in labels["c"].items() if gain} == {"d2"}
    assert evaluate("bm25", mine, split="train", show_progress=False).task().per_query.keys() == {"a", "b", "c"}
