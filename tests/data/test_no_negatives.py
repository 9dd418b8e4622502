"""What is no negative and no result: the query's own document, and what answers another query of the same words."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from st_wkl.cli import app
from st_wkl.config import RunConfig
from st_wkl.data.builder import DistillationDatasetBuilder
from st_wkl.data.candidates import bm25_candidates
from st_wkl.data.collator import ListwiseCollator
from st_wkl.data.collection import Collection
from st_wkl.data.dataset import DistillationDataset, features
from st_wkl.data.dense import retriever_candidates
from st_wkl.data.teachers import CallableTeacher
from st_wkl.evaluation import evaluate, evaluate_run
from st_wkl.evaluation.tasks import CollectionTask
from st_wkl.losses import InBatchContrastiveLoss
from st_wkl.pipeline.stages import Parts
from st_wkl.training import default_arguments
from st_wkl.training.data import training_data
from st_wkl.training.dev import GradedEvaluator
from st_wkl.training.refresh import RefreshCandidatesCallback
from tests.data.test_collection import mteb_folder
from tests.helpers.animals import write_beir
from tests.helpers.command import CliRunner

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


def contrast(model: SentenceTransformer, rows: list[dict[str, Any]]) -> float:
    batch = ListwiseCollator(model)(rows)
    features = [
        {key.removeprefix(f"{side}_"): value for key, value in batch.items() if key.startswith(f"{side}_")}
        for side in ("query", "document")
    ]
    return float(InBatchContrastiveLoss(model)(features, batch["label"]))


def by_hand(model: SentenceTransformer, cases: list[tuple[str, str, list[str]]]) -> float:
    """Return the mean of InfoNCE over (query, positive, negatives)."""
    losses = []
    for query, positive, negatives in cases:
        embeddings = model.encode([query, positive, *negatives], convert_to_tensor=True, normalize_embeddings=True)
        losses.append(-(embeddings[:1] @ embeddings[1:].T / 0.05).log_softmax(dim=1)[0, 0])
    return float(torch.stack(losses).mean())


def test_the_contrast_of_a_batch_knows_what_is_no_negative(static_student_path: Path) -> None:
    """Own documents and answers to the same question stood in its denominator, whoever had made the lists."""
    model = SentenceTransformer(str(static_student_path), device="cpu", similarity_fn_name="cosine")
    own = "river stone garden"
    rows = [
        {"query": own, "documents": ["market winter", "engine school"], "labels": [1, 0], "own": f"Title {own}"},
        {"query": "River  Stone garden", "documents": ["planet letter", f"Title {own}"], "labels": [1, 0], "own": ""},
        {"query": "bridge doctor", "documents": [own, "engine school"], "labels": [0, 1], "own": ""},
    ]
    expected = [
        (own, "market winter", ["engine school"]),  # not the twin's answer, the query's text, nor its titled document
        (rows[1]["query"], "planet letter", [f"Title {own}", "engine school"]),
        ("bridge doctor", "engine school", [own, "market winter", f"Title {own}", "planet letter"]),
    ]
    assert contrast(model, rows) == pytest.approx(by_hand(model, expected), abs=1e-5)
    for row in rows:
        row["documents"].reverse()
        row["labels"].reverse()
    assert contrast(model, rows) == pytest.approx(by_hand(model, expected), abs=1e-5)
    columns = [[own, "river stone garden", "bridge doctor"], ["market winter", "planet letter", own]]
    expected = [
        (own, "market winter", []),
        (own, "planet letter", []),
        ("bridge doctor", own, ["market winter", "planet letter"]),
    ]
    found = InBatchContrastiveLoss(model)([model.preprocess(texts) for texts in columns], None)
    assert float(found) == pytest.approx(by_hand(model, expected), abs=1e-5)


def tables(rows: list[tuple[str, list[str], list[int]]], texts: dict[str, dict[str, str]], **told: Any) -> Any:
    """Return a dataset that no builder made."""
    train = {"query_id": [], "document_ids": [], "scores": [], "labels": [], "preferences": []}  # type: ignore[var-annotated]
    for query_id, document_ids, labels in rows:
        values = (query_id, document_ids, [float(place) for place in range(len(labels))], labels)
        for name, value in zip(train, values, strict=False):
            train[name].append(value)
        last = len(labels) - 1
        train["preferences"].append([{"first": last, "second": 0, "probability": 0.75}])
    parts = {
        "queries": {"query_id": list(texts["queries"]), "text": list(texts["queries"].values())},
        "documents": {"document_id": list(texts["documents"]), "text": list(texts["documents"].values())},
    }
    made = {name: Dataset.from_dict(values, features=features(name)) for name, values in parts.items()}
    made["train"] = Dataset.from_dict(train, features=features("train", preferences=True))
    return DistillationDataset(**made, provenance=told)


def test_datasets_that_no_builder_made_are_settled_too(
    static_student_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Files of others, and of earlier versions, hold own documents and twins' answers as the hardest negatives."""
    texts = {
        "queries": {"a": "Who purrs?", "b": "who  purrs?", "x": "dogs bark"},
        "documents": {"p": "cats purr", "r": "lions roar", "x": "On dogs dogs bark", "n": "fish swim"},
    }
    rows = [("a", ["p", "r", "n"], [1, 0, 0]), ("b", ["r", "p"], [2, 0]), ("x", ["n", "x", "p"], [1, 0, 0])]
    made = tables(rows, texts)
    with pytest.warns(UserWarning, match="1 lists hold the query's own document as no answer.*2 labels are those of"):
        lists = made.to_lists().to_list()
    assert [row["labels"] for row in lists] == [[1, 2, 0], [2, 1], [1, 0]]
    assert [row["documents"] for row in lists][2] == ["fish swim", "cats purr"]
    assert [row["scores"] for row in lists][2] == [0.0, 2.0]
    assert [row["pairs"] for row in lists] == [[[2, 0, 0.75]], [[1, 0, 0.75]], [[1, 0, 0.75]]]
    assert [row["own"] for row in lists] == ["", "", "On dogs dogs bark"]
    with pytest.warns(UserWarning, match="2 labels"):
        assert made.to_columns(2)["positive"] == ["lions roar", "fish swim"]
    kept = tables(rows[2:], texts, ignore_identical_ids=False).to_lists()
    assert kept[0]["documents"] == ["fish swim", "On dogs dogs bark", "cats purr"]
    assert "own" not in kept.column_names
    plain = Dataset.from_list(
        [
            {"query": "Who purrs?", "documents": ["a", "b"], "scores": [2.0, 1.0], "labels": [1, 0]},
            {"query": "who purrs?", "documents": ["b", "who purrs?"], "scores": [2.0, 1.0], "labels": [1, 0]},
        ]
    )
    model = SentenceTransformer(str(static_student_path), device="cpu")
    training_data(plain, InBatchContrastiveLoss(model), model, default_arguments(model, tmp_path))
    assert "1 lists hold the query itself as no answer, and 1 labels contradict another row" in caplog.text


def test_what_is_shared_is_counted() -> None:
    """A label that the judgements' file does not have needs a trace in the dataset that has it."""
    queries = {"a": "topic1 item1", "b": "topic1 item1", "c": "topic2 item2"}
    documents = {f"d{i}": f"topic{i % 3} note item{i}" for i in range(20)}
    mine = Collection("twins", documents, queries, {"train": {"a": {"d1": 1}, "b": {"d4": 2}, "c": {"d2": 1}}})
    with pytest.warns(UserWarning, match=r"2 queries of split 'train'.*share its judgements \(2\)"):
        dataset = DistillationDatasetBuilder(mine, TEACHER, num_negatives=4, store=":memory:", against=None).build(
            False
        )
    assert dataset.provenance["counts"]["shared_judgements"] == dataset.provenance["counts"]["queries_that_share"] == 2


def test_one_option_on_every_surface(tmp_path: Path) -> None:
    """What a collection in memory could be told, a folder, a command and a configuration could not."""
    folder = write_beir(arguments(), tmp_path / "arguments")
    found = {flag: Collection.load(folder, ignore_identical_ids=flag) for flag in (None, True, False)}
    assert [one.leaves_out_own for one in found.values()] == [True, True, False]
    assert not Collection.from_beir(folder, ignore_identical_ids=False).leaves_out_own
    assert Collection.load(found[True]) is found[True]
    assert not Collection.load(found[True], ignore_identical_ids=False).leaves_out_own
    told = {"output": str(tmp_path), "teacher": {"model": "t"}, "student": {"model": "s"}}
    for flag, one in found.items():
        source = {"source": str(folder), "ignore_identical_ids": flag}
        parts = Parts(RunConfig.from_dict({**told, "collection": source}), show_progress=False)
        assert parts.collection.fingerprint == one.fingerprint
        assert parts.tasks() == [parts.collection]
    scores = []
    for flags in ((), ("--ignore-identical-ids",), ("--keep-identical-ids",)):
        command = ["evaluate", "bm25", str(folder), "--split", "train", "--json", "--quiet", *flags]
        scores.append(json.loads(CliRunner().invoke(app, command).stdout)["tasks"]["arguments"]["ndcg_at_10"])
    assert scores[0] == scores[1] > scores[2]
    task = CollectionTask(found[True], "train")
    with pytest.raises(ValueError, match="ignore_identical_ids is False, and arguments says True"):
        evaluate("bm25", task, ignore_identical_ids=False)


def test_what_an_mteb_task_says_of_its_dataset_is_obeyed(tmp_path: Path) -> None:
    """The dataset of a task that leaves such documents out was another collection than the task."""
    folder = mteb_folder(tmp_path / "datasets--mteb--arguana" / "snapshots" / "1")
    assert Collection.load(folder).leaves_out_own
    assert not Collection.load(folder, ignore_identical_ids=False).leaves_out_own
    assert not Collection.load(mteb_folder(tmp_path / "datasets--mteb--scifact" / "snapshots" / "1")).leaves_out_own


def test_titles_do_not_hide_the_querys_own_document() -> None:
    """Sets of arguments have titles, which a document's text begins with and a query's does not."""
    plain = arguments()
    titled = {key: f"On {WORDS[0]} {text}" for key, text in plain.documents.items()}
    with pytest.warns(UserWarning, match="12 of 12 queries"):
        assert Collection("titled", titled, plain.queries, plain.qrels).leaves_out_own


def test_ranks_do_not_count_the_querys_own_document(static_student_path: Path) -> None:
    """It is the student's first among candidates from elsewhere, so every rank was one too large."""
    mine = arguments()
    candidates = bm25_candidates(arguments(ignore_identical_ids=False), show_progress=False)
    builder = DistillationDatasetBuilder(
        mine, TEACHER, num_negatives=4, store=":memory:", against=None, candidates=candidates
    )
    refresh = RefreshCandidatesCallback(builder, builder.build(False), ranks=True, candidates=False)
    refresh.refresh(SentenceTransformer(str(static_student_path), device="cpu"))
    assert all(min(row["ranks"]) == 1 for row in refresh._rows)
    assert all(row["own"] == mine.queries[key] for key, row in zip(mine.queries, refresh.train_dataset, strict=True))
