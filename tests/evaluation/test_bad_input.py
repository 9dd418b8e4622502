"""What is wrong with the input must be said before hours of work, and nothing that exists may be lost by it.

Tested elsewhere: broken front matter in `cards/test_model_card.py` (writing) and `test_hub.py` (pushing), where no
permission and expired tokens are, too; truncated files of several commands in `test_results.py`, `test_report.py` and
`cards/test_cli_card.py`; results of two students in one file in `test_groups.py`, in one report in `test_report.py`, in
one card in `cards/test_model_card.py` and `cards/test_weights.py`.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from st_wkl.cli import app
from st_wkl.data.candidates import bm25_candidates
from st_wkl.evaluation import evaluate, evaluate_run
from st_wkl.evaluation.report import write_report
from st_wkl.evaluation.tasks import load_task, resolve_tasks
from tests.helpers.command import CliRunner
from tests.helpers.tiny import DOCUMENTS, GAINS, QUERIES, collection


def beir(folder: Path, documents: dict[str, str], queries: dict[str, str], gains: Any) -> Path:
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", documents), ("queries", queries)):
        lines = [json.dumps({"_id": key, "text": text}) for key, text in texts.items()]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    rows = [f"{query}\t{document}\t{gain}" for query, judged in gains.items() for document, gain in judged.items()]
    (folder / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *rows]) + "\n")
    return folder


def test_judgements_without_queries(static_student_path: Path, tmp_path: Path) -> None:
    """Queries of another version of the collection would all be left out, and the mean be over nothing."""
    folder = beir(tmp_path / "c", DOCUMENTS, {"x1": "another query"}, GAINS)
    with pytest.raises(ValueError, match=r"of absent queries.*q1.*Check that the files belong together"):
        evaluate(static_student_path, folder, show_progress=False)


def test_a_split_without_documents(static_student_path: Path, tmp_path: Path) -> None:
    """A corpus that was cut off scores near 0 in other tools, as if the model were bad."""
    folder = beir(tmp_path / "c", {"x1": "another document"}, QUERIES, GAINS)
    with pytest.raises(ValueError, match=r"of absent\s+documents"):
        evaluate(static_student_path, folder, show_progress=False)
    (folder / "corpus.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"no documents|is empty"):
        evaluate(static_student_path, folder, show_progress=False)


@pytest.mark.slow
def test_a_task_that_does_not_exist(tmp_path: Path) -> None:
    """A typo must be an answer with the names that are near, not a traceback, and old results must stay."""
    output = tmp_path / "results.json"
    output.write_text("of yesterday")
    failed = CliRunner().invoke(app, ["evaluate", "bm25", "SciFacts", "--output", str(output), "--quiet"])
    assert failed.exit_code == 1
    assert "'SciFacts' is neither a folder here nor an MTEB task" in failed.stderr
    assert "SciFact," in failed.stderr
    assert output.read_text() == "of yesterday"


def test_a_task_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, a NanoBEIR task resolves but cannot be loaded; the error must name a way out."""
    task = resolve_tasks("NanoNFCorpusRetrieval")[0]

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("offline mode is enabled")

    monkeypatch.setattr(type(task), "load_data", offline)
    with pytest.raises(OSError, match=r"data of NanoNFCorpus.* could not be loaded .*offline.*snapshot_download"):
        load_task(task)


def test_first_stages_that_are_none(student: Any, tmp_path: Path) -> None:
    """Candidates of another task would give a score of 0 for every query."""
    other = tmp_path / "other.trec"
    other.write_text("x1 Q0 y1 1 2.0 bm25\n")
    with pytest.warns(UserWarning, match="dropped"), pytest.raises(ValueError, match="is it the run of another task"):
        evaluate(student, collection(), first_stage=other, show_progress=False)
    with pytest.raises(ValueError, match="no candidate for any query of tiny"):
        evaluate(student, collection(), first_stage={"x1": {"d1": 1.0}}, show_progress=False)
    with pytest.raises(ValueError, match="top_k must be 1 or more, got 0"):
        evaluate(student, collection(), first_stage="bm25", top_k=0, show_progress=False)
    partly = {query: {document: 1.0 for document in gains} for query, gains in GAINS.items() if query != "q1"}
    with pytest.warns(UserWarning, match="no candidate for 1 of 6 queries of tiny, which count as 0, such as q1"):
        ours = evaluate(student, collection(), first_stage=partly, show_progress=False)
    assert ours.task().per_query["q1"] == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"q1": {"d1": math.nan}},
            ValueError,
            "run first_stage, query 'q1', document 'd1': the score is nan, not a fin",
        ),
        ({"q1": {"d1": np.float32("inf")}}, ValueError, "query 'q1', document 'd1': the score is inf, not a finite"),
        ({"q1": {"d1": "much"}}, TypeError, "query 'q1', document 'd1': 'much' is no score"),
        ({"q1": {"gone": 1.0}}, ValueError, "query 'q1': document 'gone' is not in tiny; wrong collection"),
        ({"x9": {"d1": 1.0}}, ValueError, "query 'x9' is not in tiny; wrong collection"),
        ({"q1": ["d1", "d2"]}, TypeError, r"query 'q1' has \['d1', 'd2'\]: a run maps query ids to document ids"),
        ({"q1": {7: 1.0}}, TypeError, r"query 'q1', document 7: ids are text \(str\); use str\(id\)"),
    ],
)
def test_first_stages_are_checked_as_runs_are(student: Any, change: Any, error: type, message: str) -> None:
    """A first stage that has diverged gave a number, and an unknown id a bare KeyError from inside of MTEB."""
    run = {**{query: dict.fromkeys(gains, 1.0) for query, gains in GAINS.items()}, **change}
    with pytest.raises(error, match=message):
        evaluate(student, collection(), first_stage=run, show_progress=False)
    with pytest.raises(error, match=message.replace("first_stage", "mine").replace("in tiny", "in collection tiny")):
        evaluate_run(run, collection(), name="mine")


def test_a_retriever_that_has_diverged_is_no_first_stage(student: Any) -> None:
    """Its scores are no numbers, and what MTEB ranks by them is chance."""
    broken = copy.deepcopy(student)
    with torch.no_grad():
        broken[0].embedding.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"run of local/SentenceTransformer, query 'q\d', .* the score is nan"):
        evaluate(student, collection(), first_stage=broken, show_progress=False)


def test_candidates_are_a_run(student: Any) -> None:
    """What every miner of this package returns must be a first stage and a run, without a detour."""
    mined = bm25_candidates(collection(), top_k=3, show_progress=False)
    ours, named = (
        evaluate(student, collection(), first_stage=first, top_k=3, show_progress=False).task()
        for first in (mined, "bm25")
    )
    assert (ours.task, ours.per_query) == ("tiny-rerank-run-top3", named.per_query)
    everything = bm25_candidates(collection(), show_progress=False)
    run = evaluate_run(everything, collection(), name="bm25").task()
    assert run.per_query == evaluate("bm25", collection(), show_progress=False).task().per_query


def test_a_bad_file_is_found_out_before_the_work(static_student_path: Path, tmp_path: Path) -> None:
    """The other model's file is truncated: nothing is computed, and no file of ours is touched."""
    folder = beir(tmp_path / "c", {k: v or "." for k, v in DOCUMENTS.items()}, QUERIES, GAINS)
    output, broken = tmp_path / "r.json", tmp_path / "broken.json"
    arguments = ["evaluate", str(static_student_path), str(folder), "--output", str(output), "--quiet"]
    done = CliRunner().invoke(app, [*arguments, "--efficiency", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["efficiency"]["dimension"] == 256
    before = output.read_bytes()
    broken.write_bytes(before[:-30])
    failed = CliRunner().invoke(app, [*arguments, "--against", str(broken)])
    assert failed.exit_code == 1
    assert "broken.json is damaged or incomplete" in failed.stderr
    assert output.read_bytes() == before
    compared = CliRunner().invoke(app, [*arguments, "--against", str(output), "--teacher", str(output)])
    assert "undefined: the teacher is not better" in compared.stdout


def test_files_of_others_are_not_replaced(student: Any, tmp_path: Path) -> None:
    """A slip of the keyboard in --output must not cost somebody's corpus."""
    for name in ("notes.json", "corpus.jsonl"):
        (tmp_path / name).write_text('{"mine": 1}\n')
    with pytest.raises(FileExistsError, match=r"notes\.json would be replaced: .*choose another output"):
        evaluate(student, collection(), output=tmp_path / "notes.json", show_progress=False)
    results = evaluate(student, collection(), output=tmp_path / "ours.json", show_progress=False)
    evaluate(student, collection(), output=tmp_path / "ours.json", show_progress=False)
    with pytest.raises(FileExistsError, match=r"corpus\.jsonl is there and is no HTML page"):
        write_report(tmp_path / "corpus.jsonl", {"before": results})
    for _ in range(2):
        write_report(tmp_path / "report.html", {"before": results})
    assert [(tmp_path / name).read_text() for name in ("notes.json", "corpus.jsonl")] == ['{"mine": 1}\n'] * 2


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            {"model": "d/r.trec"},
            FileNotFoundError,
            r"model is 'd/r\.trec', which is not there, .*evaluate_run\(read_run",
        ),
        ({"model": "not a model!"}, FileNotFoundError, "model is 'not a model!' and has to be a model's folder or Hub"),
        ({"model": "runs/1/student"}, FileNotFoundError, "model is 'runs/1/student' and has to be"),
        ({"model": Path("student")}, FileNotFoundError, "model is 'student' and has to be .*there is no such folder"),
        ({"first_stage": "d/r.trec.gz"}, FileNotFoundError, r"first_stage is 'd/r\.trec\.gz', which is not there"),
        (
            {"tasks": "d/corpus.jsonl"},
            FileNotFoundError,
            "a task is 'd/corpus.jsonl', which is not there, and",
        ),
        ({"tasks": ["no\\such\\folder/x"]}, FileNotFoundError, "a task is .* and has to be the name of an MTEB task"),
        ({"tasks": [7]}, TypeError, "a task is a int; it has to be the name of an MTEB task or benchmark, a BEIR"),
    ],
)
def test_what_no_hub_can_have_is_not_asked_for(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], error: type, message: str
) -> None:
    """A run file in place of a model was asked of the Hub, with retries, for minutes before it failed."""
    monkeypatch.setattr("st_wkl.data.collection.Collection.from_hub", lambda *_, **__: pytest.fail("the Hub was asked"))
    monkeypatch.setitem(evaluate.__globals__, "_carried_exposure", lambda *_: pytest.fail("the Hub was asked"))
    with pytest.raises(error, match=message):
        evaluate(**{"model": "org/model", "tasks": collection(), "show_progress": False, **given})


def test_a_run_file_is_no_model(tmp_path: Path) -> None:
    """Whoever has a run has no model, and is told what scores it."""
    run = tmp_path / "bm25"
    run.write_text("q1 Q0 d1 1 2.0 bm25\n")
    with pytest.raises(ValueError, match=r"bm25', a file, and has to be a model's folder .*evaluate_run\(read_run"):
        evaluate(run, collection(), show_progress=False)
