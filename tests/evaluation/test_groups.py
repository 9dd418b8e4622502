"""Every result of a trained student is given three times; the parts must be the right ones and hard to lose."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mteb
import pytest
from sentence_transformers import SentenceTransformer

from st_wkl.data.collection import Collection
from st_wkl.evaluation import Results, TaskScores, compare, evaluate, evaluate_run
from st_wkl.evaluation.results import results_table
from st_wkl.evaluation.tasks import CollectionTask
from st_wkl.record import Exposure
from st_wkl.text import text_hash

DOCUMENTS = {
    "d1": "Cats sleep for most of the day and purr when they are content.",
    "d2": "The stock market fell after the bank raised its interest rate.",
    "d3": "The heart pumps blood through the body.",
    "d4": "Rain falls when clouds cool down.",
}
QUERIES = {"q1": "which pet purrs", "q2": "why do prices fall", "q3": "what moves blood", "q4": "what causes rain"}
GAINS = {"q1": {"d1": 2, "d4": 0}, "q2": {"d2": 1, "d1": 0}, "q3": {"d3": 1}, "q4": {"d4": 1}}
# Trained on cats and rain; the words of q4 were a training query. White space is no difference.
SEEN = Exposure(
    frozenset([text_hash("what  causes rain ")]), frozenset(text_hash(f"{DOCUMENTS[d]}\n") for d in ("d1", "d4"))
)
GROUPS = {"shared": ["q1", "q4"], "unseen": ["q2", "q3"]}


def collection() -> Collection:
    return Collection("tiny", dict(DOCUMENTS), dict(QUERIES), {"test": GAINS})


def of(per_query: dict[str, float], **changes: Any) -> Results:
    values: dict[str, Any] = {"task": "tiny", "split": "test", "subset": "default", "main_metric": "ndcg_at_10"}
    values |= {"metrics": {"ndcg_at_10": math.fsum(per_query.values()) / len(per_query)}, "per_query": per_query}
    values |= {"dataset_revision": "abc", "seconds": 0.0}
    return Results(model={"name": "m", "revision": "r"}, tasks=[TaskScores(**{**values, **changes})])


BEFORE = of({"q1": 0.2, "q2": 0.4, "q3": 0.6, "q4": 0.8})
AFTER = of({"q1": 0.8, "q2": 0.4, "q3": 0.5, "q4": 0.9}, groups=GROUPS)


def test_a_folder_that_carries_hashes_is_evaluated_three_times(static_student_path: Path, tmp_path: Path) -> None:
    """The user does nothing for it: the student's folder says what it was trained on, and the table has the parts."""
    student = SentenceTransformer(str(static_student_path), device="cpu")
    student.save_pretrained(str(tmp_path / "student"))
    SEEN.save(tmp_path / "student")
    ours = evaluate(tmp_path / "student", collection(), output=tmp_path, show_progress=False)
    assert ours.task().groups == GROUPS
    assert ours.task().training_queries == ["q4"]
    assert Results.load(tmp_path) == ours
    table = ours.table()
    assert "| nDCG@10 | shared | unseen |" in table
    assert f"| {ours.task().mean('shared'):.4f} (2) | {ours.task().mean('unseen'):.4f} (2) |" in table
    assert evaluate(student, collection(), show_progress=False).task().groups == {}
    assert evaluate(student, collection(), exposure=SEEN, show_progress=False).task().groups == GROUPS


def test_titles_are_part_of_the_document(static_student_path: Path) -> None:
    """MTEB keeps title and text apart; hashed apart, no document of a task by name would ever be recognised."""
    from datasets import Dataset

    task = CollectionTask(collection(), "test")
    task.load_data()
    data = task.dataset["default"]["test"]
    title, text = DOCUMENTS["d1"].split(" ", 1)
    rows = [{"id": key, "title": "", "text": value} for key, value in DOCUMENTS.items()]
    rows[0] |= {"title": title, "text": text}
    data["corpus"] = Dataset.from_list(rows)
    student = SentenceTransformer(str(static_student_path), device="cpu")
    ours = evaluate(student, task, exposure=SEEN, show_progress=False)
    assert isinstance(task, mteb.AbsTask)
    assert ours.task().groups == GROUPS


def test_a_run_has_parts_as_well() -> None:
    """A teacher that was tuned on the collection has seen its documents as a student has."""
    run = {query: {"d1": 1.0, "d2": 0.5} for query in QUERIES}
    ours = evaluate_run(run, collection(), name="run", exposure=SEEN).task()
    assert (ours.groups, ours.training_queries) == (GROUPS, ["q4"])
    assert ours.mean("shared") == pytest.approx(0.5)


def test_empty_parts_are_left_out() -> None:
    """A student of another collection has no shared query; a mean over nothing must not be asked for."""
    nothing = Exposure(frozenset(), frozenset())
    ours = evaluate_run({"q1": {"d1": 1.0}}, collection(), name="run", exposure=nothing, query_ids=["q1"]).task()
    assert ours.groups == {"unseen": ["q1"]}
    with pytest.raises(ValueError, match=r"has the groups unseen, not 'shared'; .*exposure="):
        ours.mean("shared")


def test_a_part_without_queries_is_no_lack_of_hashes() -> None:
    """Whoever compares on shared queries, and has none, would look for hashes that are there."""
    nothing = Exposure(frozenset(), frozenset())
    ours = evaluate_run({"q1": {"d1": 1.0}}, collection(), name="run", exposure=nothing, query_ids=["q1"])
    with pytest.raises(ValueError, match=r"all 1 queries are unseen, by the student's hashes"):
        compare(ours, ours, group="shared")


def test_means_of_groups_and_metrics() -> None:
    """Cards print these numbers; the parts must weigh up to the whole."""
    scores = AFTER.task()
    assert scores.mean("shared") == pytest.approx(0.85)
    assert scores.mean("unseen") == pytest.approx(0.45)
    assert scores.mean() == pytest.approx(scores.ndcg_at_10) == pytest.approx((2 * 0.85 + 2 * 0.45) / 4)
    with pytest.raises(ValueError, match="recall_at_10 is not kept per query, only ndcg_at_10; evaluate again"):
        scores.mean(metric="recall_at_10")


def test_comparisons_by_group() -> None:
    """.80 on all and .52 on unseen queries is the difference between a demonstration and a result."""
    assert compare(BEFORE, AFTER, group="shared").mean == pytest.approx(0.35)
    unseen = compare(BEFORE, AFTER, group="unseen")
    assert (unseen.mean, unseen.queries, unseen.group) == (pytest.approx(-0.05), 2, "unseen")
    assert "2 unseen queries" in str(unseen)
    assert compare(AFTER, BEFORE, group="unseen").mean == pytest.approx(0.05), "the groups of either side will do"
    with pytest.raises(ValueError, match="not 'seen'"):
        compare(BEFORE, AFTER, group="seen")
    with pytest.raises(ValueError, match="not both"):
        compare(BEFORE, AFTER, group="unseen", query_ids=["q1"])


def test_other_metrics_compare(static_student_path: Path) -> None:
    """Recall decides whether a reranker can follow; it needs its own paired test."""
    run = {query: {"d1": 1.0, "d2": 0.5} for query in QUERIES}
    ours = evaluate_run(run, collection(), name="run")
    scores = ours.task()
    for metric in ("recall_at_10", "recall_at_100", "mrr_at_10"):
        assert scores.mean(metric=metric) == pytest.approx(scores.metrics[metric], abs=1e-6)
    full = evaluate(SentenceTransformer(str(static_student_path), device="cpu"), collection(), show_progress=False)
    for metric in ("recall_at_10", "recall_at_100", "mrr_at_10"):
        assert full.task().mean(metric=metric) == pytest.approx(full.task().metrics[metric], abs=1e-5)
    gain = compare(ours, full, metric="recall_at_10")
    assert gain.mean == pytest.approx(0.5)
    assert "+0.5000 Recall@10" in str(gain)


def test_a_row_without_parts_borrows_those_of_its_neighbour() -> None:
    """Before and after must stand over the same queries, or the two numbers do not compare."""
    lines = results_table({"before": BEFORE, "after": AFTER}).splitlines()
    assert lines[2:] == [
        "| tiny (test) | before | 4 | 0.5000 | 0.5000 (2) | 0.5000 (2) |",
        "| tiny (test) | after | 4 | 0.6500 | 0.8500 (2) | 0.4500 (2) |",
    ]
    other = of(dict(AFTER.task().per_query), groups={"unseen": list(QUERIES)})
    assert "| before | 4 | 0.5000 |  |  |" in results_table({"before": BEFORE, "after": AFTER, "other": other})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": {"shared": ["q9"]}}, "1 queries of the groups were not evaluated, such as q9"),
        ({"groups": {"shared": []}}, "a group is empty"),
        ({"groups": {"shared": ["q1"], "unseen": ["q1"]}}, "a query stands in two"),
        ({"training_queries": ["q9"]}, "such as q9"),
        ({"query_metrics": {"mrr_at_10": {"q1": 1.0}}}, "mrr_at_10 per query needs a finite value for each"),
    ],
)
def test_parts_of_other_queries_are_refused(changes: dict[str, Any], message: str) -> None:
    """Groups of another evaluation would give means over the wrong queries."""
    with pytest.raises(ValueError, match=message):
        of({"q1": 0.5, "q2": 0.7}, **changes)


def test_files_of_version_1_are_read(tmp_path: Path) -> None:
    """An evaluation took hours; a new version must not make its file worthless."""
    file = BEFORE.save(tmp_path / "results.json")
    payload = json.loads(file.read_text())
    for name in ("groups", "training_queries", "query_metrics"):
        del payload["tasks"][0][name]
    del payload["checksum"]
    file.write_text(json.dumps({**payload, "schema_version": 1}))
    assert Results.load(file) == BEFORE


def test_results_of_two_students_in_one_file_are_refused(tmp_path: Path) -> None:
    """Someone who copies a task's block from one file into another gets one student's score under another's name."""
    file = BEFORE.save(tmp_path / "results.json")
    payload = json.loads(file.read_text())
    other = json.loads(AFTER.save(tmp_path / "other.json").read_text())
    for key, value in (("tasks", other["tasks"]), ("model", {**payload["model"], "name": "other"})):
        file.write_text(json.dumps({**payload, key: value}))
        with pytest.raises(ValueError, match="results of two students are mixed"):
            Results.load(file)
