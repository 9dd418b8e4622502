"""Where plain MTEB silently gives a wrong number, and we the right one. Each test shows both.

| trap | plain MTEB | test |
| --- | --- | --- |
| T1 | all local models share one cached score | `test_another_local_model_gets_its_own_score` |
| T1b | a student trained in memory has its base's score | `test_a_model_trained_in_memory_gets_its_own_score` |
| T2 | a cross-encoder is its folder | `test_a_cross_encoder_retrained_in_place_gets_its_own_score` |
| T3 | first stage and depth of a reranking are lost | `test_another_depth_of_reranking_is_another_task` |
| T4 | offline, reranking becomes retrieval | `test_a_reranking_task_without_its_lists_is_refused` |
| T5, T6 | its embedding cache doubles titles | `test_titles_are_not_doubled_and_embeddings_not_anothers` |
| T7 | rankings keep another model's name | `test_rankings_are_of_the_model_that_was_asked` |
| T8 | what the Hub knows of a model is not fetched | `test_what_a_model_is_does_not_depend_on_the_hub` |
| T9 | means and tasks on two scales, or no file at all | `test_published_scores_are_on_one_scale` |
| T10 | a query without an answer counts as a failure | `test_queries_without_an_answer_are_left_out_and_counted` |
| T11 | scores that YAML writes as Python objects | `test_scores_are_plain_floats` |

The others are what follows from them: our own cache, two stages with it, and sparse students, which MTEB cannot rerank.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mteb
import pytest
import yaml
from datasets import Dataset
from mteb.models import ModelMeta
from mteb.models.cache_wrappers import CachedEmbeddingWrapper
from sentence_transformers import CrossEncoder, SparseEncoder
from transformers import BertForMaskedLM, BertForSequenceClassification

from st_wkl.evaluation import evaluate
from st_wkl.evaluation.identity import identified
from st_wkl.evaluation.tasks import CollectionTask
from st_wkl.publish.front_matter import write_eval_results
from st_wkl.publish.leaderboard_model import model_meta
from st_wkl.publish.model_card import write_model_card
from tests.helpers.tiny import GAINS, QUERIES, collection, plain_mteb, reranking_task, scrambled


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


def test_a_reranking_task_without_its_lists_is_refused(student: Any) -> None:
    """Trap: offline, MTEB loses the candidates of a reranking task and silently searches the whole corpus."""
    task = CollectionTask(collection(), "test")
    task.metadata = task.metadata.model_copy(update={"type": "Reranking"})
    task.load_data()
    task.dataset["default"]["test"]["top_ranked"] = {query: ["d11", list(gains)[-1]] for query, gains in GAINS.items()}
    truth = plain_mteb(student, task, None)
    assert evaluate(student, task, show_progress=False).tasks[0].main_score == pytest.approx(truth)
    task.dataset["default"]["test"]["top_ranked"] = None
    assert plain_mteb(student, task, None) != truth, "MTEB has repaired this; so can we be simpler"
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


def test_a_cache_of_our_own_never_returns_an_old_number(student: Any, tmp_path: Path) -> None:
    """The cache is worth having only if a checkpoint that was retrained in place is computed anew."""
    folder, cache = tmp_path / "student", tmp_path / "cache"
    student.save_pretrained(str(folder))
    old = evaluate(folder, collection(), cache=cache, show_progress=False)
    again = evaluate(folder, collection(), cache=cache, show_progress=False)
    assert again.tasks == old.tasks, "with the same seconds: it was not computed again"
    other = scrambled(student)
    other.save_pretrained(str(folder))
    ours = evaluate(folder, collection(), cache=cache, show_progress=False)
    assert ours.name == old.name
    assert ours.ndcg_at_10 == pytest.approx(plain_mteb(other, CollectionTask(collection(), "test"), None))
    swapped = collection(test={**GAINS, "q1": {"d2": 2, "d1": 1}})
    fresh = evaluate(folder, swapped, show_progress=False)
    assert evaluate(folder, swapped, cache=cache, show_progress=False).task().per_query == fresh.task().per_query


@pytest.mark.slow
def test_two_stages_keep_first_stage_and_depth_apart(student: Any, tiny_bert: Any, tmp_path: Path) -> None:
    """Trap, once more with our own cache: other candidates under one name would give each other's numbers."""
    model = CrossEncoder(str(tiny_bert(BertForSequenceClassification, seed=1)), device="cpu")
    (tmp_path / "own.run").write_text("".join(f"{q} Q0 {d} 1 1.0 x\n" for q, gains in GAINS.items() for d in gains))
    found = {}
    for first, top_k in (("bm25", 2), ("bm25", 5), (student, 5), (tmp_path / "own.run", 5)):
        scores = evaluate(
            model, collection(), first_stage=first, top_k=top_k, cache=tmp_path / "cache", show_progress=False
        ).task()
        plain = evaluate(model, collection(), first_stage=first, top_k=top_k, show_progress=False).task()
        assert scores.per_query == plain.per_query
        found[scores.task] = scores
    names = ["bm25-top2", "bm25-top5", "SentenceTransformer-top5", "own-top5"]
    assert list(found) == [f"tiny-rerank-{name}" for name in names]
    assert len({scores.dataset_revision for scores in found.values()}) == 4
    assert found["tiny-rerank-own-top5"].metrics["recall_at_10"] == 1.0
    ours = found["tiny-rerank-SentenceTransformer-top5"]
    truth = plain_mteb(model, reranking_task(student, tmp_path / "run", 5), None)
    assert ours.ndcg_at_10 == pytest.approx(truth, abs=1e-5)


def test_a_sparse_student_reranks(student: Any, tiny_bert: Any, tmp_path: Path) -> None:
    """Trap: MTEB cannot rerank with a sparse model unless the task is of the type Reranking."""
    model = SparseEncoder(str(tiny_bert(BertForMaskedLM, seed=2)), device="cpu")
    with pytest.raises(NotImplementedError, match=r"aten::index\.Tensor"):
        plain_mteb(model, reranking_task(student, tmp_path / "run", 12), None)
    ours = evaluate(model, collection(), first_stage=student, top_k=12, show_progress=False)
    full = evaluate(model, collection(), show_progress=False)
    assert ours.task().task == "tiny-rerank-SentenceTransformer-top12"
    # With every document among the candidates, reranking is searching.
    assert ours.ndcg_at_10 == pytest.approx(full.ndcg_at_10, abs=1e-5)


def test_titles_are_not_doubled_and_embeddings_not_anothers(student: Any, tmp_path: Path) -> None:
    """Traps: MTEB's embedding cache puts each title in twice, and returns another model's embeddings."""
    task = CollectionTask(collection(), "test")
    task.load_data()
    data = task.dataset["default"]["test"]
    halves = [(key, *text.partition(" ")[::2]) for key, text in zip(*data["corpus"].to_dict().values(), strict=True)]
    data["corpus"] = Dataset.from_list([{"id": key, "title": title, "text": text} for key, title, text in halves])
    other = scrambled(student)
    cached = plain_mteb(CachedEmbeddingWrapper(identified(student), tmp_path), task, None)
    truth = {name: evaluate(one, collection(), show_progress=False) for name, one in (("a", student), ("b", other))}
    assert plain_mteb(CachedEmbeddingWrapper(identified(other), tmp_path), task, None) == pytest.approx(cached)
    assert truth["a"].ndcg_at_10 != truth["b"].ndcg_at_10, "the trap would not show"
    for name, one in (("a", student), ("b", other)):
        ours = evaluate(one, task, show_progress=False)
        assert ours.task().per_query == truth[name].task().per_query


def test_rankings_are_of_the_model_that_was_asked(student: Any, tmp_path: Path) -> None:
    """Trap: MTEB merges rankings into a file that keeps the first model's name."""
    task, other = CollectionTask(collection(), "test"), scrambled(student)
    for name, model in (("org/a", student), ("org/b", other)):
        mteb.evaluate(
            identified(model, name=name), task, cache=None, prediction_folder=tmp_path / "p", show_progress_bar=False
        )
    kept = json.loads((tmp_path / "p" / "tiny_predictions.json").read_text())
    assert kept["mteb_model_meta"]["model_name"] == "org/a", "MTEB has repaired this; so can we be simpler"
    for model in (student, other):
        cached = evaluate(model, collection(), cache=tmp_path / "cache", show_progress=False)
        assert cached.task().per_query == evaluate(model, collection(), show_progress=False).task().per_query
    assert len(list((tmp_path / "cache" / "rankings").iterdir())) == 2


def test_what_a_model_is_does_not_depend_on_the_hub(student: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap: asked to fetch what the Hub knows of a model, MTEB does not, and leaves size and licence out."""
    asked: list[str] = []
    monkeypatch.setattr(ModelMeta, "_from_hub", lambda name, revision=None: asked.append(name))
    student.model_card_data.base_model = "tester/base"
    with pytest.warns(DeprecationWarning, match="Setting `fetch_from_hf=False`"):
        plain = ModelMeta.from_sentence_transformer_model(student, fetch_from_hf=True)
    assert (plain.name, plain.n_parameters, plain.license) == ("tester/base", None, None)
    assert asked == [], "MTEB has repaired this; so can we be simpler"
    size = sum(weight.numel() for weight in student.parameters())
    assert evaluate(student, collection(), show_progress=False).model["parameters"] == size
    meta = model_meta(student, name="org/x", revision="0" * 40, license="mit", training_datasets=set())
    assert (meta.n_parameters, meta.license, meta.memory_usage_mb) == (size, "mit", round(4 * size / 2**20))


def test_published_scores_are_on_one_scale(student: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap: MTEB publishes tasks from 0 to 100, their mean from 0 to 1, and nothing if a task of it is missing."""
    published: dict[str, Any] = {}

    def upload(folder_path: Path, **_: Any) -> None:
        published.update({file.name: yaml.safe_load(file.read_text()) for file in Path(folder_path).iterdir()})

    monkeypatch.setattr("huggingface_hub.upload_folder", upload)
    tasks: list[Any] = [CollectionTask(collection(name), "test") for name in ("SciFact", "NFCorpus")]
    outcome = mteb.evaluate(student, tasks[0], cache=None, show_progress_bar=False, co2_tracker=False)
    outcome.push_model_results(benchmark=mteb.Benchmark(name="B", tasks=tasks[:1], benchmark_hf_repo="org/b"))
    (one, *_), (mean,) = published["SciFact.yaml"], published["B.yaml"]
    assert one["value"] == pytest.approx(100 * mean["value"]), "MTEB has repaired this; so can we be simpler"
    with pytest.raises(ValueError, match="Input should be a valid number"):
        outcome.push_model_results(benchmark=mteb.Benchmark(name="B", tasks=tasks, benchmark_hf_repo="org/b"))
    ours = evaluate(student, collection("SciFact"), show_progress=False)
    assert write_eval_results(tmp_path, ours) == [], "unlike MTEB, we do not claim to have run the Hub's own data"
    ours.tasks[0].dataset_revision = one["dataset"]["revision"]
    (file,) = write_eval_results(tmp_path, ours)
    card = write_model_card(tmp_path, record=None, results={"after": ours})
    entries = yaml.safe_load(card.read_text().split("---")[1])["model-index"][0]["results"]
    values = {metric["value"] for entry in entries for metric in entry["metrics"] if metric["type"] == "ndcg_at_10"}
    values |= {entry["value"] for entry in yaml.safe_load(file.read_text())}
    assert values == {one["value"]}


def test_scores_are_plain_floats(student: Any) -> None:
    """Trap: MTEB's scores are numpy's, which YAML writes as Python objects."""
    outcome = mteb.evaluate(student, CollectionTask(collection(), "test"), cache=None, show_progress_bar=False)
    assert "python/object" in yaml.dump(outcome.task_results[0].get_score()), "MTEB has repaired this"
    ours = evaluate(student, collection(), show_progress=False)
    numbers = [*ours.task().metrics.values(), *ours.task().per_query.values()]
    assert yaml.safe_load(yaml.safe_dump(numbers)) == numbers
    assert all(0 <= number <= 1 for number in numbers), "one scale, 0 to 1, for tasks and means alike"
