"""The numbers must be MTEB's, of the model and the task that were asked for, and of no other."""

from __future__ import annotations

import copy
import json
import math
import warnings
from pathlib import Path
from typing import Any

import mteb
import pytest
import torch
from mteb.mocks.mock_tasks import MockMultilingualRetrievalTask, MockRerankingTask, MockSTSTask
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
)

from st_wkl.data.collection import Collection
from st_wkl.evaluation import Results, compare, evaluate, evaluate_run
from st_wkl.evaluation.identity import identified
from st_wkl.evaluation.tasks import CollectionTask, resolve_tasks

DOCUMENTS = {
    "d1": "Cats sleep for most of the day and purr when they are content.",
    "d2": "Dogs bark at strangers and love long walks.",
    "d3": "The stock market fell sharply after the bank raised its interest rate.",
    "d4": "Inflation makes bread and milk more expensive every year.",
    "d5": "A football team has eleven players on the field.",
    "d6": "Tennis is played with a racket and a ball on a court.",
    "d7": "Paris is the capital of France and lies on the Seine.",
    "d8": "Berlin is the capital of Germany and has many lakes.",
    "d9": "The heart pumps blood through the body.",
    "d10": "Vitamin C in oranges supports the immune system.",
    "d11": "",
    "d12": "Rain falls when clouds cool down.",
}
QUERIES = {
    "q1": "which pet purrs",
    "q2": "why do prices rise",
    "q3": "how many people play in a soccer team",
    "q4": "capital city on a river",
    "q5": "what keeps blood moving",
    "q6": "what causes rain",
}
GAINS = {
    "q1": {"d1": 2, "d2": 1},
    "q2": {"d4": 2, "d3": 1, "d9": 0},
    "q3": {"d5": 1, "d6": 0},
    "q4": {"d7": 2, "d8": 1},
    "q5": {"d9": 1},
    "q6": {"d12": 1},
}


def collection(name: str = "tiny", **qrels: Any) -> Collection:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the empty document, which is there on purpose
        return Collection(name, dict(DOCUMENTS), dict(QUERIES), qrels or {"test": GAINS})


@pytest.fixture
def student(static_student_path: Path) -> Any:
    """Return a real retriever that a test may change."""
    return SentenceTransformer(str(static_student_path), device="cpu")


def scrambled(model: Any) -> Any:
    """Return the model with its tokens' embeddings in a random order, which no longer retrieves anything."""
    other = copy.deepcopy(model)
    weight = other[0].embedding.weight.data
    weight.copy_(weight[torch.randperm(len(weight), generator=torch.Generator().manual_seed(0))])
    return other


@pytest.fixture(scope="module")
def tiny_bert(static_student_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that saves a tiny random BERT with a real vocabulary into a folder."""

    def build(head: type, seed: int = 0, folder: Path | None = None) -> Path:
        torch.manual_seed(seed)
        folder = folder or tmp_path_factory.mktemp("tiny-bert")
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(static_student_path / "tokenizer.json"), pad_token="[PAD]", model_max_length=64
        )
        sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        sizes |= {"vocab_size": len(tokenizer), "intermediate_size": 16, "max_position_embeddings": 64, "num_labels": 1}
        config = BertConfig(**sizes)
        # With the usual tiny initial weights every pair would get almost the same score.
        config.initializer_range = 0.5
        head(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return build


def plain_mteb(model: Any, task: Any, cache: mteb.ResultCache | None) -> float:
    """Return what a user of MTEB's defaults gets."""
    found = mteb.evaluate(model, task, cache=cache, show_progress_bar=False, co2_tracker=False)
    return float(found.task_results[0].get_score())


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


def test_graded_gains_count(student: Any) -> None:
    """A retriever that finds the better of two answers first must get more than one that finds the worse one."""
    swapped = {**GAINS, "q1": {"d1": 1, "d2": 2}}
    right, wrong = (evaluate(student, collection(test=qrels), show_progress=False) for qrels in (GAINS, swapped))
    assert right.task().per_query["q1"] > wrong.task().per_query["q1"]


def test_another_local_model_gets_its_own_score(student: Any, tmp_path: Path) -> None:
    """Trap: MTEB calls all local models the same and gives the second one the first one's cached score."""
    other, task, cache = scrambled(student), CollectionTask(collection(), "test"), mteb.ResultCache(tmp_path)
    first = plain_mteb(student, task, cache)
    truth = plain_mteb(other, task, None)
    assert abs(first - truth) > 0.05
    assert plain_mteb(other, task, cache) == first, "MTEB has repaired this; so can we be simpler"
    assert evaluate(student, collection(), show_progress=False).ndcg_at_10 == pytest.approx(first)
    assert evaluate(other, collection(), show_progress=False).ndcg_at_10 == pytest.approx(truth)
    # The identity alone is enough: with it even the shared cache is safe.
    assert plain_mteb(identified(student), task, cache) == first
    assert plain_mteb(identified(other), task, cache) == truth


def test_a_model_trained_in_memory_gets_its_own_score(student: Any, tmp_path: Path) -> None:
    """Trap: a student that was loaded from the Hub keeps its base's name and revision while it is trained."""
    student.model_card_data.base_model = "tester/base"
    student.model_card_data.base_model_revision = "0" * 40
    task, cache = CollectionTask(collection(), "test"), mteb.ResultCache(tmp_path)
    before = plain_mteb(student, task, cache)
    ours_before = evaluate(student, collection(), show_progress=False)
    student[0].embedding.weight.data = scrambled(student)[0].embedding.weight.data
    truth = plain_mteb(student, task, None)
    assert plain_mteb(student, task, cache) == before != truth, "MTEB has repaired this; so can we be simpler"
    ours_after = evaluate(student, collection(), show_progress=False)
    assert ours_after.ndcg_at_10 == pytest.approx(truth)
    assert ours_before.model["name"] == ours_after.model["name"] == "tester/base"
    assert ours_before.model["revision"] != ours_after.model["revision"]
    assert plain_mteb(identified(student), task, cache) == truth


def reranking_task(student: Any, folder: Path, top_k: int) -> Any:
    mteb.evaluate(
        student, CollectionTask(collection(), "test"), cache=None, prediction_folder=folder, show_progress_bar=False
    )
    return CollectionTask(collection(), "test").convert_to_reranking(folder, top_k=top_k)


def test_a_cross_encoder_retrained_in_place_gets_its_own_score(student: Any, tiny_bert: Any, tmp_path: Path) -> None:
    """Trap: MTEB knows a cross-encoder by its folder only, so new weights in it keep the old score."""
    task, cache = reranking_task(student, tmp_path / "run", 5), mteb.ResultCache(tmp_path / "cache")
    folder = tiny_bert(BertForSequenceClassification, seed=1)
    old = plain_mteb(CrossEncoder(str(folder), device="cpu"), task, cache)
    ours_old = evaluate(folder, task, show_progress=False)
    tiny_bert(BertForSequenceClassification, seed=5, folder=folder)
    truth = plain_mteb(CrossEncoder(str(folder), device="cpu"), task, None)
    assert old != truth
    assert plain_mteb(CrossEncoder(str(folder), device="cpu"), task, cache) == old, "MTEB has repaired this"
    ours = evaluate(folder, task, show_progress=False)
    assert ours.model["class"] == "CrossEncoder"
    assert (ours_old.ndcg_at_10, ours.ndcg_at_10) == pytest.approx((old, truth))
    assert ours.model["revision"] != ours_old.model["revision"]


def test_another_depth_of_reranking_is_another_task(student: Any, tiny_bert: Any, tmp_path: Path) -> None:
    """Trap: a top-2 and a top-10 run of the same reranker share a name, so MTEB's cache gives one for the other."""
    model = CrossEncoder(str(tiny_bert(BertForSequenceClassification, seed=1)), device="cpu")
    cache = mteb.ResultCache(tmp_path / "cache")
    shallow, deep = (reranking_task(student, tmp_path / "run", top_k) for top_k in (2, 10))
    first, truth = plain_mteb(model, deep, cache), plain_mteb(model, shallow, None)
    assert first != truth
    assert plain_mteb(model, shallow, cache) == first, "MTEB has repaired this; so can we be simpler"
    ours = [evaluate(model, task, show_progress=False).tasks[0] for task in (deep, shallow)]
    assert [scores.ndcg_at_10 for scores in ours] == pytest.approx([first, truth])
    assert [scores.task for scores in ours] == ["tiny-rerank-available-top10", "tiny-rerank-available-top2"]
    assert ours[0].dataset_revision != ours[1].dataset_revision


def test_a_reranker_without_candidates_is_told_so(tiny_bert: Any) -> None:
    """A cross-encoder cannot search; the error must say how to give it lists."""
    model = CrossEncoder(str(tiny_bert(BertForSequenceClassification)), device="cpu")
    with pytest.raises(ValueError, match=r"tiny has no candidates.*first_stage=.bm25."):
        evaluate(model, collection(), show_progress=False)


def test_a_reranking_task_without_its_lists_is_refused(student: Any) -> None:
    """Trap: offline, MTEB loses the candidates of a reranking task and silently searches the whole corpus."""
    task = MockRerankingTask()
    task.load_data()
    assert evaluate(student, task, show_progress=False).tasks[0].per_query
    for data in task.dataset["default"].values():
        data["top_ranked"] = None
    with pytest.raises(ValueError, match="lists of candidates were not found"):
        evaluate(student, task, show_progress=False)


def test_queries_without_an_answer_are_left_out_and_counted(student: Any) -> None:
    """Trap: MTEB scores a query whose judgements are all 0 as a failure of the model."""
    qrels = {**GAINS, "q3": {"d6": 0, "d5": 0}}
    with pytest.warns(UserWarning, match="1 of 6 test queries of tiny have no relevant document and are left out.*q3"):
        ours = evaluate(student, collection(test=qrels), show_progress=False)
    assert set(ours.task().per_query) == set(QUERIES) - {"q3"}
    task = CollectionTask(collection(), "test")
    task.qrels = qrels  # as MTEB would have read the files
    assert plain_mteb(student, task, None) < ours.ndcg_at_10
    with pytest.raises(ValueError, match="no query with a relevant document"):
        evaluate(student, collection(test={"q1": {"d1": 0}}), show_progress=False)


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
