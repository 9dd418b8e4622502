"""The numbers must be MTEB's, of the model and the task that were asked for, and of no other."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pytest
from mteb.mocks.mock_tasks import MockMultilingualRetrievalTask, MockSTSTask
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
)

from st_wkl.data.candidates import bm25_candidates
from st_wkl.data.teachers import CallableTeacher, CrossEncoderTeacher
from st_wkl.evaluation import Results, compare, evaluate, evaluate_run
from st_wkl.evaluation.tasks import CollectionTask, resolve_tasks
from tests.helpers.animals import write_beir
from tests.helpers.tiny import DOCUMENTS, GAINS, QUERIES, collection, plain_mteb, scrambled


def test_every_query_and_the_mean_are_mtebs(student: Any) -> None:
    """Our results must be MTEB's own on a clean cache, with a score for each query."""
    ours = evaluate(student, collection(), show_progress=False)
    assert ours.ndcg_at_10 == pytest.approx(plain_mteb(student, CollectionTask(collection(), "test"), None), abs=1e-6)
    scores = ours.task("tiny")
    assert set(scores.per_query) == set(QUERIES)
    assert math.fsum(scores.per_query.values()) / 6 == pytest.approx(scores.ndcg_at_10, abs=1e-5)
    assert len(set(scores.per_query.values())) > 1
    assert {"map_at_1000", "mrr_at_10", "recall_at_10", "recall_at_100"} <= set(scores.metrics)
    assert not any("nauc" in metric for metric in scores.metrics)
    assert scores.dataset_revision == collection().fingerprint


def test_cut_embeddings_are_mtebs_and_the_models_own_stay(student: Any) -> None:
    """A student is deployed at some of its dimensions, and a number of all of them would promise too much."""
    cut = evaluate(student, collection(), truncate_dim=8)
    assert student.truncate_dim is None
    whole = evaluate(student, collection())
    assert (cut.name, cut.model["dimension"]) == (f"{whole.name}, 8 dimensions", 8)
    assert cut.model["settings_hash"] != whole.model["settings_hash"]
    student = copy.deepcopy(student)
    student.truncate_dim = 8
    assert evaluate(student, collection()).tasks[0].per_query == cut.tasks[0].per_query != whole.tasks[0].per_query
    for wrong in (0, True, 2.5, 10_000):
        with pytest.raises(ValueError, match="truncate_dim must be from 1 to the model's 8, got"):
            evaluate(student, collection(), truncate_dim=wrong)
    with pytest.raises(ValueError, match="truncate_dim cuts embeddings, and this model has none"):
        evaluate("bm25", collection(), truncate_dim=8)


def test_graded_gains_count(student: Any) -> None:
    """A retriever that finds the better of two answers first must get more than one that finds the worse one."""
    swapped = {**GAINS, "q1": {"d1": 1, "d2": 2}}
    right, wrong = (evaluate(student, collection(test=qrels), show_progress=False) for qrels in (GAINS, swapped))
    assert right.task().per_query["q1"] > wrong.task().per_query["q1"]


def test_a_reranker_without_candidates_is_told_so(tiny_bert: Any) -> None:
    """A cross-encoder cannot search; the error must say how to give it lists."""
    model = CrossEncoder(str(tiny_bert(BertForSequenceClassification)), device="cpu")
    with pytest.raises(ValueError, match=r"tiny has no candidates.*first_stage=.bm25."):
        evaluate(model, collection(), show_progress=False)


@pytest.mark.parametrize(
    ("cls", "head"),
    [(SparseEncoder, BertForMaskedLM), (MultiVectorEncoder, BertModel), (SentenceTransformer, BertModel)],
)
def test_every_retriever_class_is_evaluated_as_itself(cls: Any, head: type, tiny_bert: Any, tmp_path: Path) -> None:
    """A sparse or late-interaction student evaluated as a dense one would get a number, and the wrong one."""
    model = cls(str(tiny_bert(head)), device="cpu")
    model.save_pretrained(str(tmp_path / "student"))
    ours = evaluate(tmp_path / "student", collection(), show_progress=False)
    assert ours.model["class"] == cls.__name__
    assert ours.name == "student"
    truth = plain_mteb(cls(str(tmp_path / "student"), device="cpu"), CollectionTask(collection(), "test"), None)
    assert ours.ndcg_at_10 == pytest.approx(truth, abs=1e-6)


def test_a_broken_model_does_not_get_a_score(student: Any) -> None:
    """NaN embeddings rank in memory order, which MTEB scores as if it were a ranking."""
    student[0].embedding.weight.data[:] = float("nan")
    with pytest.raises(ValueError, match="the score is nan, not a finite number"):
        evaluate(student, collection(), show_progress=False)


def test_results_are_written_and_read_back(student: Any, tmp_path: Path) -> None:
    """The file must hold the very object that was returned, in JSON that every language reads."""
    ours = evaluate(student, collection(), output=tmp_path / "new" / "folder", name="org/student", show_progress=False)
    file = tmp_path / "new" / "folder" / "results.json"
    assert Results.load(file) == ours
    json.loads(file.read_text(), parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
    assert ours.model["name"] == "org/student"
    assert ours.model["parameters"] == sum(p.numel() for p in student.parameters())
    assert ours.model["max_seq_length"] is None, "a static model has no limit, and JSON has no infinity"


def test_scores_survive_a_full_disk(student: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """An hour of evaluation must not be lost because its file cannot be written."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left") as caught:
        evaluate(student, collection(), output=tmp_path / "r.json", show_progress=False)
    assert "| tiny (test) | SentenceTransformer | 6 |" in caught.value.__notes__[0]
    assert list(tmp_path.iterdir()) == []


def test_without_progress_nothing_is_printed(student: Any, capfd: Any, caplog: Any) -> None:
    """In a log file bars and upstream's warnings about itself bury what matters; with progress there is a bar."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        evaluate(student, collection(), show_progress=False)
    printed = capfd.readouterr()
    assert printed.out + printed.err == ""
    assert caplog.messages == []
    messages = [str(w.message) for w in caught]
    assert not any("fill_missing" in message or "get_sentence_embedding" in message for message in messages), messages
    evaluate(student, collection(), show_progress=True)
    assert "it/s" in capfd.readouterr().err


def test_several_tasks_and_splits(student: Any) -> None:
    """One call may hold collections of several kinds; splits are chosen, never guessed."""
    dev = collection("dev-only", dev={"q1": {"d1": 1}})
    ours = evaluate(student, [collection(), dev], show_progress=False)
    assert [(t.task, t.split) for t in ours.tasks] == [("tiny", "test"), ("dev-only", "dev")]
    both = collection(train={"q1": {"d1": 1}}, dev={"q2": {"d4": 1}})
    assert set(evaluate(student, both, split="train", show_progress=False).task().per_query) == {"q1"}
    with pytest.raises(ValueError, match="has the splits train, dev; name one with split="):
        evaluate(student, both, show_progress=False)
    with pytest.raises(ValueError, match=r"no split 'test'.*'train', 'dev'"):
        evaluate(student, both, split="test", show_progress=False)
    with pytest.raises(ValueError, match="two tasks are called tiny"):
        evaluate(student, [collection(), collection()], show_progress=False)
    with pytest.raises(ValueError, match="no task to evaluate on"):
        evaluate(student, [], show_progress=False)


def test_mtebs_own_kinds_of_tasks(student: Any) -> None:
    """Tasks with several subsets or other metrics must keep them apart, and be usable again afterwards."""
    task = MockMultilingualRetrievalTask()
    for _ in range(2):
        ours = evaluate(student, task, show_progress=False)
        expected = [(split, subset) for split in task.eval_splits for subset in task.hf_subsets]
        assert [(t.split, t.subset) for t in ours.tasks] == expected
        assert all(t.per_query for t in ours.tasks)
    sts = evaluate(student, MockSTSTask(), show_progress=False).tasks[0]
    assert (sts.main_metric, sts.per_query) == ("cosine_spearman", {})


def test_a_task_by_name(student: Any, monkeypatch: Any) -> None:
    """`evaluate(model, "NFCorpus")` is what everyone types; its data come from memory here, not from the Hub."""

    def load_data(self: Any, **_: Any) -> None:
        local = CollectionTask(collection(), "test")
        local.load_data()
        self.dataset, self.data_loaded = local.dataset, True

    monkeypatch.setattr(type(mteb.get_task("NFCorpus")), "load_data", load_data)
    ours = evaluate(student, "NFCorpus", show_progress=False).tasks[0]
    assert ours.task == "NFCorpus"
    assert ours.dataset_revision == mteb.get_task("NFCorpus").metadata.dataset["revision"]
    assert ours.ndcg_at_10 == evaluate(student, collection(), show_progress=False).ndcg_at_10


@pytest.mark.slow
def test_names_resolve_to_tasks() -> None:
    """Benchmarks stand for their tasks and aggregated tasks for their parts, each with the asked split."""
    names = [task.metadata.name for task in resolve_tasks(["NanoBEIR", "CQADupstackRetrieval"])]
    assert {"NanoNFCorpusRetrieval", "CQADupstackAndroidRetrieval"} <= set(names)
    assert len(names) == 13 + 12
    assert resolve_tasks("SciFact", "train")[0].eval_splits == ["train"]
    own = mteb.get_task("SciFact")
    assert resolve_tasks(own, "train")[0].eval_splits == ["train"]
    assert own.eval_splits == ["test"], "the caller's task was changed"


@pytest.mark.parametrize(
    ("name", "nearest"), [("SCIFACT", "SciFact"), ("NFCorpuss", "NFCorpus"), ("nanobeir", "NanoBEIR")]
)
def test_an_unknown_name_gets_the_nearest(name: str, nearest: str) -> None:
    """MTEB's names mix cases; a typo must not end in a bare KeyError."""
    with pytest.raises(ValueError, match=f"neither a folder here nor an MTEB task.*did you mean.*{nearest}"):
        resolve_tasks(name)


def test_a_missing_folder_is_said_to_be_missing(tmp_path: Path) -> None:
    """A mistyped path must not be looked up on the Hub."""
    for path in (tmp_path / "nothing", str(tmp_path / "nothing")):
        with pytest.raises(FileNotFoundError, match="nothing"):
            resolve_tasks(path)


def test_a_name_like_a_hub_id_works(student: Any) -> None:
    """Collections from the Hub carry a slash, which MTEB would take for a folder of its prediction file."""
    assert evaluate(student, collection("mteb/tiny"), show_progress=False).tasks[0].task == "mteb/tiny"


@pytest.mark.slow
def test_cranfield(static_student_path: Path, shared_data: Path) -> None:
    """A real model on a real collection has the number that is known for it."""
    with pytest.warns(UserWarning, match="documents of 'cranfield' have no text"):
        ours = evaluate(static_student_path, shared_data / "cranfield", show_progress=False)
    assert ours.name == "potion-base-8M"
    assert len(ours.task("cranfield").per_query) == 225
    assert ours.ndcg_at_10 == pytest.approx(0.353, abs=0.0015)


def run_of(student: Any, folder: Path) -> dict[str, dict[str, float]]:
    task = CollectionTask(collection(), "test")
    mteb.evaluate(student, task, cache=None, prediction_folder=folder, show_progress_bar=False)
    run: dict[str, dict[str, float]] = json.loads((folder / "tiny_predictions.json").read_text())["default"]["test"]
    return run


def test_a_run_scores_as_the_model_that_made_it(student: Any, tmp_path: Path) -> None:
    """BM25's row and the student's must be comparable, so every metric must be MTEB's."""
    student = scrambled(student)  # so that the first hit is not always at the top
    model = evaluate(student, collection(), show_progress=False)
    run = evaluate_run(run_of(student, tmp_path), collection(), name="the same")
    assert run.task().metrics["mrr_at_1"] < run.task().metrics["mrr_at_10"]
    assert run.task().metrics == pytest.approx(model.task().metrics, abs=1e-5)
    assert run.task().per_query == model.task().per_query
    assert compare(model, run).p_value == 1
    assert run.model["class"] == "run"


@pytest.mark.parametrize("score", [lambda i: 1 - 1e-9 * i, lambda i: 1e300 - 1e290 * i, lambda i: -i * 1e-50])
def test_scores_order_a_run_as_they_are(score: Callable[[int], float]) -> None:
    """trec_eval rounds to single precision: a perfect run, close together, was ordered by its ids."""
    wrong = sorted((key for key in DOCUMENTS if key not in GAINS["q1"]), reverse=True)
    ranked = ["d1", "d2", *wrong]
    run = {"q1": {key: score(place) for place, key in enumerate(ranked)}}
    ours = evaluate_run(run, collection(test={"q1": GAINS["q1"]}), name="mine")
    assert ours.ndcg_at_10 == 1.0
    assert ours.task().metrics["mrr_at_10"] == 1.0
    tied = evaluate_run({"q1": dict.fromkeys(ranked, 2.0)}, collection(test={"q1": {"d1": 1}}), name="mine")
    assert tied.task().metrics["mrr_at_10"] == 0.0  # equal ones are in trec_eval's order still, d1 the last


def test_gains_of_a_task_are_those_of_a_collection(student: Any) -> None:
    """MTEB takes any gain: a time stamp ended in 0.0 or 7e13, a float in a TypeError without a place."""
    task = CollectionTask(collection(), "test")
    task.load_data()
    truth = evaluate("bm25", task, show_progress=False).ndcg_at_10
    data = task.dataset["default"]["test"]
    data["relevant_docs"]["q1"] = {"d1": np.float64(2.0), "d2": np.int8(1)}
    assert evaluate("bm25", task, show_progress=False).ndcg_at_10 == truth
    data["relevant_docs"]["q1"] = {"d1": 1_700_000_000_000}
    with pytest.raises(
        ValueError, match=r"tiny, default, test, query 'q1', document 'd1': .* can only hold gains up to 1,000,000"
    ):
        evaluate("bm25", task, show_progress=False)


def test_a_run_may_miss_queries_but_not_silently() -> None:
    """A first stage that finds nothing has failed that query; it must not raise the mean by leaving it out."""
    run = {"q1": {"d1": 1.0}, "q2": {}}
    with pytest.warns(UserWarning, match="run BM25: 5 of 6 test queries of tiny have no documents and count as 0"):
        ours = evaluate_run(run, collection(), name="BM25")
    assert ours.ndcg_at_10 == pytest.approx(ours.task().per_query["q1"] / 6, abs=1e-6)
    assert ours.task().per_query["q2"] == 0


def test_a_sample_of_the_queries() -> None:
    """A slow teacher is measured on a sample, which must not be filled up with zeros."""
    ours = evaluate_run({"q1": {"d1": 1.0, "d2": 0.5}}, collection(), name="teacher", query_ids=["q1"])
    assert ours.task().per_query == {"q1": 1.0}
    with pytest.raises(ValueError, match=r"1 of 2 ids have no relevant document in split 'test' of tiny \(such as q9"):
        evaluate_run({"q1": {"d1": 1.0}}, collection(), name="teacher", query_ids=["q1", "q9"])


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"q9": {"d1": 1.0}}, "run BM25: query 'q9' is not in collection tiny"),
        ({"q1": {"d99": 1.0}}, "query 'q1': document 'd99' is not in collection tiny"),
        ({"q1": {"d1": float("nan")}}, "query 'q1', document 'd1': the score is nan"),
        ({}, "run BM25 is empty"),
    ],
)
@pytest.mark.filterwarnings("ignore:run BM25")
def test_a_run_of_another_collection_is_refused(run: dict[str, dict[str, float]], message: str) -> None:
    """Ids that do not match score 0 in every tool, and look like a bad model."""
    with pytest.raises(ValueError, match=message):
        evaluate_run(run, collection(), name="BM25")


@pytest.mark.parametrize(
    "name",
    ["../../../outside", "/outside", "..", ".hidden", "long" * 62, "组" * 90, "mteb/tiny"],
    ids=["above", "absolute", "parent", "hidden", "long", "bytes", "hub"],
)
def test_names_stay_names_in_a_cache(student: Any, tmp_path: Path, name: str) -> None:
    """A collection's name comes with its files, and must neither leave the cache nor fail after the work."""
    cache = tmp_path / "a" / "b" / "cache"
    first = evaluate(student, collection(name), name=name, cache=cache, show_progress=False)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written
    assert all(path.is_relative_to(cache) and not path.name.startswith(".") for path in written)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(student), "encode", lambda *_, **__: pytest.fail("it is in the cache"))
        again = evaluate(student, collection(name), name=name, cache=cache, show_progress=False)
    assert (again.tasks[0].task, again.tasks[0].per_query) == (name, first.tasks[0].per_query)


def test_a_first_stage_of_any_name_can_be_reranked(student: Any, tmp_path: Path) -> None:
    """MTEB calls files after tasks, whose names say the first stage, such as a run file's of 245 characters."""
    run = tmp_path / f"{'r' * 240}.trec"
    run.write_text("".join(f"{query} Q0 d{rank} {rank} {9 - rank} x\n" for query in QUERIES for rank in range(1, 6)))
    found = evaluate(student, collection("c" * 100), first_stage=run, cache=tmp_path / "cache", show_progress=False)
    assert len(f"{found.tasks[0].task}_predictions.json") < 255


def test_a_teacher_is_evaluated_as_it_scores(cross_encoder_onnx_path: Path, tmp_path: Path) -> None:
    """The packaged teacher is in the ONNX format, and a function has no class: both can be measured as rerankers."""
    function = CallableTeacher(lambda q, d: len({*q.split()} & {*d.split()}), name="overlap", version="1")
    for model, teacher in (
        (cross_encoder_onnx_path, CrossEncoderTeacher(cross_encoder_onnx_path)),
        (function, function),
    ):
        ours = evaluate(model, collection(), first_stage="bm25", top_k=5, show_progress=False)
        candidates = bm25_candidates(collection(), show_progress=False, top_k=5)
        run = {}
        for query, hits in candidates.items():
            pairs = [(QUERIES[query], DOCUMENTS[hit.document_id]) for hit in hits]
            run[query] = {hit.document_id: float(s) for hit, s in zip(hits, teacher.score(pairs), strict=True)}
        assert ours.task().per_query == evaluate_run(run, collection(), name="x").task().per_query
        assert ours.model["settings"] == teacher.identity
    with pytest.raises(ValueError, match="can only rerank"):
        evaluate(function, collection(), output=tmp_path / "results", show_progress=False)
    assert not any(tmp_path.iterdir()), "what failed leaves no folder behind"


@pytest.mark.filterwarnings("ignore:.*have no text")
def test_a_run_is_scored_on_a_folder(tmp_path: Path) -> None:
    """`evaluate` takes a folder, so that nobody expects to load it for a run."""
    folder = write_beir(collection(), tmp_path / "tiny")
    run = {query: dict.fromkeys(gains, 1.0) for query, gains in GAINS.items()}
    assert evaluate_run(run, folder, name="x").task().per_query == (
        evaluate_run(run, collection(), name="x").task().per_query
    )
