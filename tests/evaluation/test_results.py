"""The results file is read by people, cards and later versions; it must be strict, whole and consistent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from st_wkl.evaluation import Comparison, Results, TaskScores
from st_wkl.evaluation.results import results_table


def scores(**changes: Any) -> TaskScores:
    values: dict[str, Any] = {
        "task": "tiny",
        "split": "test",
        "subset": "default",
        "main_metric": "ndcg_at_10",
        "metrics": {"ndcg_at_10": 0.5, "recall_at_100": 0.9},
        "per_query": {"q1": 0.25, "q2": 0.75},
        "dataset_revision": "abc",
        "seconds": 1.5,
    }
    return TaskScores(**{**values, **changes})


def results(*tasks: TaskScores, name: str = "student") -> Results:
    return Results(model={"name": name, "revision": "r1", "class": "SentenceTransformer"}, tasks=list(tasks))


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    """The card and the comparison must see the very numbers that were measured."""
    before = results(scores(per_query={"q1": 1 / 3, "q2": 2 / 3}), scores(task="other"))
    file = before.save(tmp_path / "runs" / "student")
    assert file == tmp_path / "runs" / "student" / "results.json"
    assert Results.load(file) == Results.load(file.parent) == before
    assert '"q1": 0.333333,' in file.read_text(), "six decimals, in memory as on disk"
    assert before.save(tmp_path / "one.json") == tmp_path / "one.json"
    assert [p.name for p in file.parent.iterdir()] == ["results.json"], "a temporary file was left behind"


def test_numbers_become_plain_finite_floats(tmp_path: Path) -> None:
    """MTEB returns numpy floats and NaN, which YAML writes as Python objects and JSON cannot write at all."""
    entry = scores(metrics={"ndcg_at_10": np.float64(0.5), "nauc_ndcg_at_10_max": float("nan"), "x": np.inf})
    assert entry.metrics == {"ndcg_at_10": 0.5}
    assert type(entry.metrics["ndcg_at_10"]) is float
    text = results(entry).save(tmp_path / "results.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_query": {"q1": 0.25, "q2": 0.7}}, "2 queries average to nDCG@10 0.475"),
        ({"per_query": {"q1": float("nan")}}, "nDCG@10 of query 'q1' is nan"),
        ({"main_metric": "map_at_10"}, "main metric 'map_at_10' is missing"),
        ({"metrics": {"ndcg_at_10": float("nan")}}, "main metric 'ndcg_at_10' is missing or not finite"),
    ],
)
def test_scores_that_contradict_themselves_are_refused(changes: dict[str, Any], message: str) -> None:
    """Per-query scores of another run than the mean would make every comparison wrong."""
    with pytest.raises(ValueError, match=message):
        scores(**changes)


def test_rounding_is_no_contradiction() -> None:
    """MTEB rounds means to 5 decimals; that must pass while a difference of 2e-5 must not."""
    per_query = {f"q{i}": 1 / 3 for i in range(7)}
    scores(metrics={"ndcg_at_10": 0.33333}, per_query=per_query)
    with pytest.raises(ValueError, match="average"):
        scores(metrics={"ndcg_at_10": 0.33331}, per_query=per_query)


def damage(file: Path, **changes: Any) -> None:
    payload = json.loads(file.read_text())
    for key, value in changes.items():
        payload[key] = value
        if value is None:
            del payload[key]
    file.write_text(json.dumps(payload))


def test_a_truncated_file_is_named_with_the_remedy(tmp_path: Path) -> None:
    """A disk that filled up must not end in a JSON traceback."""
    file = results(scores()).save(tmp_path / "results.json")
    file.write_text(file.read_text()[:-40])
    with pytest.raises(ValueError, match=r"results\.json is damaged or incomplete .* run the evaluation again"):
        Results.load(file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 3}, "pip install -U st-wkl"),
        ({"schema_version": None}, "not a results file of st_wkl"),
        ({"schema_version": "1"}, "schema_version '1'"),
        ({"tasks": None}, "'tasks' is missing"),
        ({"model": {"name": "x"}}, "'revision' is missing"),
        ({"model": []}, "needs a name"),
        ({"tasks": [{"task": "tiny"}]}, "missing 7 required"),
        ({"tasks": [7]}, "cannot be used"),
        ({"tasks": {}}, "must be a list"),
    ],
)
def test_a_file_of_another_shape_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """A wrong or newer file must say what to do instead of giving half of the numbers."""
    file = results(scores()).save(tmp_path / "results.json")
    damage(file, **changes)
    with pytest.raises(ValueError, match=message):
        Results.load(file)


def test_numbers_that_someone_edited_are_refused(tmp_path: Path) -> None:
    """Results of two models mixed in one file must not load."""
    file = results(scores()).save(tmp_path / "results.json")
    payload = json.loads(file.read_text())
    payload["tasks"][0]["per_query"]["q1"] = 0.9
    file.write_text(json.dumps(payload))
    with pytest.raises(ValueError, match="different runs or different queries"):
        Results.load(file)


def test_nan_in_a_file_is_refused(tmp_path: Path) -> None:
    """Python reads NaN from JSON without a word; nobody else can."""
    file = results(scores()).save(tmp_path / "results.json")
    file.write_text(file.read_text().replace("0.25", "NaN"))
    with pytest.raises(ValueError, match="holds NaN"):
        Results.load(file)


@pytest.mark.parametrize("failure", ["full disk", "no JSON"])
def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str) -> None:
    """Neither a full disk nor a value that JSON cannot hold may cost the results that are already there."""
    file = results(scores()).save(tmp_path / "results.json")
    before = file.read_bytes()
    changed = results(scores(), name="other")
    if failure == "no JSON":
        changed.model["parameters"] = float("inf")
    else:
        monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises((ValueError, OSError), match=r"not JSON compliant|No space left"):
        changed.save(file)
    assert file.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_access_to_one_task() -> None:
    """A script with one task must not index lists, and one with several must not get the wrong one."""
    single = results(scores())
    assert single.ndcg_at_10 == 0.5
    assert single.task("tiny").main_score == 0.5
    double = results(scores(), scores(split="dev", metrics={"ndcg_at_10": 0.4}, per_query={}))
    assert double.task("tiny", split="dev").ndcg_at_10 == 0.4
    with pytest.raises(ValueError, match=r"2 entries fit task 'tiny', not one; there is tiny \(test, default\), tiny"):
        double.task("tiny")
    with pytest.raises(ValueError, match="0 entries fit task 'scifact'"):
        single.task("scifact")


def test_the_table_shows_every_task_and_label() -> None:
    """The terminal and the card print this; a pipe in a label must not break it."""
    other = scores(task="sts", main_metric="cosine_spearman", metrics={"cosine_spearman": 0.8}, per_query={})
    table = results_table({"before|x": results(scores(), other), "after": results(scores(), other)})
    assert table.splitlines() == [
        "| Task | Model | Queries | nDCG@10 | Recall@100 | cosine_spearman |",
        "| :-- | :-- | --: | --: | --: | --: |",
        "| tiny (test) | before\\|x | 2 | 0.5000 | 0.9000 |  |",
        "| tiny (test) | after | 2 | 0.5000 | 0.9000 |  |",
        "| sts (test) | before\\|x |  |  |  | 0.8000 |",
        "| sts (test) | after |  |  |  | 0.8000 |",
    ]
    assert "student" in results(scores()).table()


def test_a_comparison_reads_as_a_sentence() -> None:
    """The interval and the p-value must stand beside every difference that is printed."""
    line = str(Comparison(0.013, 0.008, 0.018, 1e-4, 2000, 400, 1300, 300))
    assert line.startswith("+0.0130 nDCG@10, 95 % interval [+0.0080, +0.0180], p = 0.0001, ")
    assert line.endswith("2000 queries (400 wins, 1300 ties, 300 losses)")


@pytest.mark.parametrize(
    ("name", "what"),
    [("absent.json", "is not there"), ("notes.txt", "is a file of another kind"), ("folder", "is a folder without")],
)
def test_an_argument_that_is_no_results_file_is_told_what_is(tmp_path: Path, name: str, what: str) -> None:
    """Errno 20 of a path that nobody typed says nothing to someone who passed the wrong argument."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(FileNotFoundError, match=rf"{name} {what}.*st-wkl evaluate MODEL TASK --output"):
        Results.load(tmp_path / name)


def test_results_are_looked_at_as_a_table() -> None:
    """`print(results)` was 9,000 characters of dictionaries, a notebook's cell as well."""
    ours = results(scores(groups={"shared": ["q1"], "unseen": ["q2"]}), scores(task="a<b", per_query={}))
    text = repr(ours)
    assert text.splitlines()[0] == f"Results of student (SentenceTransformer, revision r1, {ours.created})"
    assert "| tiny (test) | student | 2 | 0.5000 | 0.2500 (1) | 0.7500 (1) | 0.9000 |" in text
    assert repr(ours.tasks[0]) == (
        "<TaskScores tiny (test): nDCG@10 0.5000, Recall@100 0.9000, 2 queries (1 shared, 1 unseen)>"
    )
    many = results(*(scores(task=f"task {i}") for i in range(60)))
    assert len(repr(many).splitlines()) < 20
    assert "and 48 more; .table() shows all" in repr(many)
    html = ours._repr_html_()
    assert html.count("<tr>") == 3
    assert "<td>a&lt;b (test)</td>" in html
