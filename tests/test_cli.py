"""The command line as a user runs it: output for people and machines, errors in one line, work that goes on."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from st_wkl import demo as demo_module
from st_wkl.cli._answers import _json
from st_wkl.data.builder import DistillationDatasetBuilder
from tests.helpers.animals import WordOverlap, small_collection, write_beir
from tests.helpers.command import st_wkl
from tests.helpers.students import make_student


@pytest.fixture
def beir_folder(tmp_path: Path) -> Path:
    return write_beir(small_collection(), tmp_path / "animals")


def test_build_train_evaluate(
    beir_folder: Path, static_student_path: Path, cross_encoder_onnx_path: Path, tmp_path: Path
) -> None:
    """The stages have to fit together through nothing but the files that they leave."""
    scored, student, before = tmp_path / "scored", tmp_path / "student", tmp_path / "before.json"
    common = ["--json", "--quiet"]
    build = ["build", beir_folder, "--teacher", cross_encoder_onnx_path, "--output", scored, "--num-negatives", 4]
    code, out, err = st_wkl(*build, "--limit", 12, "--store", tmp_path / "scores.sqlite3", *common)
    assert code == 0, err
    assert json.loads(out)["counts"]["queries"] == 12
    # What makes the dataset again, without this machine's folders.
    assert json.loads(out)["command"].startswith("st-wkl build animals ")
    for told in (f"--teacher {cross_encoder_onnx_path.name}", "--output scored", "--num-negatives 4"):
        assert told in json.loads(out)["command"]
    assert str(tmp_path) not in json.loads(out)["command"]
    train = ["train", scored, "--student", static_student_path, "--output", student, "--epochs", 1]
    train += ["--batch-size", 4, "--loss", "weighted-kl", "--gamma", 2, "--query-prompt", "query: "]
    code, out, err = st_wkl(*train, *common)
    assert code == 0, err
    assert json.loads(out)["loss_config"]["gamma"] == 2.0
    assert json.loads(out)["prompts"] == {"query": "query: "}
    assert "'loss'" not in err, "quiet is quiet"
    card = (student / "README.md").read_text(encoding="utf-8")
    assert "WeightedKLDistillationLoss" in card
    line = "st-wkl train scored --student potion-base-8M --output student"
    assert line in card.replace(static_student_path.name, "potion-base-8M")
    assert str(tmp_path) not in card
    code, out, err = st_wkl("evaluate", static_student_path, beir_folder, "--output", before, *common)
    assert code == 0, err
    code, out, err = st_wkl("evaluate", student, beir_folder, "--against", before, *common)
    assert code == 0, err
    answer = json.loads(out)
    assert 0 < answer["tasks"]["animals"]["ndcg_at_10"] <= 1
    assert answer["difference"]["animals"]["queries"] == 40
    after = tmp_path / "after.json"
    code, out, err = st_wkl("evaluate", student, beir_folder, "--against", before, "--output", after, "--quiet")
    assert re.search(r"against .*before\.json:\n\| Task .*Δ nDCG@10 \[95 %\](.|\n)*\| animals \(test\)", out)
    code, out, err = st_wkl("card", student, f"before={before}", f"after={after}")
    assert code == 0, err
    card = (student / "README.md").read_text(encoding="utf-8")
    assert "after − before" in card
    assert line in card.replace(static_student_path.name, "potion-base-8M"), "what `train` knew is still told"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "nowhere", "--teacher", "x", "--output", "out"], "is neither a folder nor a Hub id"),
        (["train", "nowhere", "--student", "x", "--output", "out"], "nowhere"),
        (["train", "nowhere", "--student", "x", "--output", "out", "--merge"], "add --lora"),
        (["train", "nowhere", "--student", "x", "--output", "out", "--patience", "2"], "add --dev"),
        (["train", ".", "--student", "x", "--output", "out", "--set", "report_to=none"], "as in training.report_to="),
        (["evaluate", "x/y/z", "NoSuchTask", "--against", "nowhere.json"], "nowhere.json"),
    ],
)
def test_errors_are_one_line_and_exit_1(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trace of forty lines hides the one that says what to do."""
    monkeypatch.chdir(tmp_path)
    code, out, err = st_wkl(*arguments, "--quiet")
    assert code == 1
    assert out == ""
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_judgements_of_absent_texts_can_be_dropped(beir_folder: Path) -> None:
    """The remedy that the error names has to be there where there is no Python."""
    with (beir_folder / "qrels" / "test.tsv").open("a") as file:
        file.write("\nq0-0\tgone\t1\n")
    code, _, err = st_wkl("evaluate", "bm25", beir_folder, "--quiet")
    assert code == 1
    assert "--missing drop" in err
    code, out, err = st_wkl("evaluate", "bm25", beir_folder, "--missing", "drop", "--json", "--quiet")
    assert code == 0, err
    assert json.loads(out)["tasks"].keys() == {"animals"}


def test_train_has_every_loss_and_the_adapter_in_one_command(
    beir_folder: Path, tiny_bert_path: Path, tmp_path: Path
) -> None:
    """What `distill` can do and the command cannot, is lost to those who do not write Python."""
    from st_wkl.pipeline.options import LossConfig, described
    from st_wkl.training import LOSSES

    assert re.findall(r"`([a-z-]+)`", described(LossConfig)["name"].partition(". ")[0])[: len(LOSSES)] == list(LOSSES)
    builder = DistillationDatasetBuilder(small_collection(), WordOverlap(), num_negatives=4, store=":memory:")
    scored = builder.build(show_progress=False).save_to_disk(tmp_path / "scored")
    student = tmp_path / "tiny"
    make_student("dense", tiny_bert_path).save_pretrained(str(student))
    train = ["train", scored, "--student", student, "--batch-size", 4, "--epochs", 1, "--json", "--quiet"]
    train += ["--loss", "margin-kl", "--parameter", "pairs=all", "--lora", "--dev", beir_folder, "--dev-split", "test"]
    code, out, err = st_wkl(*train, "--merge", "--patience", 2, "--output", tmp_path / "student")
    assert code == 0, err
    record = json.loads(out)
    assert (record["loss"], record["loss_config"]["pairs"], record["lora"]["rank"]) == ("MarginKL", "all", 16)
    assert set(record["dev"]) == {"before", "after"}
    assert (tmp_path / "student" / "model.safetensors").is_file()
    assert (tmp_path / "student-adapter" / "adapter_config.json").is_file()
    code, _, err = st_wkl("train", scored, "--student", student, "--output", tmp_path / "x", "--loss", "margin-lk")
    assert code == 1
    assert "did you mean 'margin-kl'" in err
    assert not (tmp_path / "x").exists()


def test_existing_output_is_refused_before_any_work(beir_folder: Path, tmp_path: Path) -> None:
    """Scoring takes hours; that its result has nowhere to go must be known before."""
    code, _, err = st_wkl("build", beir_folder, "--teacher", "x", "--output", tmp_path)
    assert code == 1
    assert "exists already" in err


@pytest.mark.slow
def test_demo_resumes_and_prints_one_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo is the first contact: its numbers have to be complete, and a second run must only read them."""
    sizes = {"train_questions": 40, "test_questions": 60, "teacher_questions": 5}
    run = demo_module.SETTINGS["run"] | {"candidates": {"num_negatives": 3}, "training": {"num_train_epochs": 1}}
    monkeypatch.setattr(demo_module, "SETTINGS", demo_module.SETTINGS | sizes | {"run": run})
    code, out, err = st_wkl("demo", "--output", tmp_path / "demo", "--json")
    assert code == 0, err
    answer: dict[str, Any] = json.loads(out)
    assert answer["ndcg_at_10"].keys() == {"student_before", "student_after", "bm25", "teacher"}
    assert answer["difference"].keys() == {"mean", "low", "high", "p_value"}
    assert (answer["queries"], answer["teacher_queries"]) == (60, 5)
    difference = answer["ndcg_at_10"]["student_after"] - answer["ndcg_at_10"]["student_before"]
    assert difference == pytest.approx(answer["difference"]["mean"], abs=1e-4)
    monkeypatch.setattr("st_wkl.data.teachers.CrossEncoderTeacher.score", lambda *_: pytest.fail("scored again"))
    monkeypatch.setattr("st_wkl.training.distill", lambda *_, **__: pytest.fail("trained again"))
    code, again, err = st_wkl("demo", "--output", tmp_path / "demo", "--json", "--quiet")
    assert code == 0, err
    assert json.loads(again)["ndcg_at_10"] == answer["ndcg_at_10"]
    code, table, _ = st_wkl("demo", "--output", tmp_path / "demo", "--quiet")
    assert "The training and the test questions differ, but both ask about the same" in table
    labels = ("student before", "KL and contrast", "weighted KL", "MarginKL", "BM25", "teacher")
    assert all(label in table for label in labels)
    cards = list((tmp_path / "demo" / "students").glob("*/README.md"))
    assert len(cards) == 4
    assert all("st-wkl demo" in card.read_text(encoding="utf-8") for card in cards)
    code, _, err = st_wkl("demo", "--output", tmp_path / "demo", "--hub")
    assert code == 1
    assert "another version or source" in err


def test_dry_run_and_scores(
    beir_folder: Path, cross_encoder_onnx_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours of scoring are announced before they are spent, and what they gave can be looked at and taken along."""
    store, output = tmp_path / "scores.sqlite3", tmp_path / "scored"
    build = ["build", beir_folder, "--teacher", cross_encoder_onnx_path, "--output", output, "--num-negatives", 3]
    build += ["--limit", 5, "--store", store]
    code, out, err = st_wkl(*build, "--dry-run", "--json", "--quiet")
    assert code == 0, err
    assert json.loads(out)["pairs"] == 20
    assert not output.exists()
    code, _, err = st_wkl(*build, "--quiet")
    assert code == 0, err
    code, out, err = st_wkl("scores", "info", "--store", store)
    assert code == 0, err
    assert "ms-marco-MiniLM-L12-v2" in out
    code, out, err = st_wkl("scores", "verify", "--store", store, "--json")
    assert json.loads(out)["scores"] == 20
    code, out, err = st_wkl("scores", "export", tmp_path / "scores.parquet", "--store", store, "--json", "--quiet")
    assert json.loads(out)["scores"] == 20
    assert (tmp_path / "scores.parquet").is_file()
    other = tmp_path / "other.sqlite3"
    code, out, err = st_wkl("scores", "import", tmp_path / "scores.parquet", "--store", other, "--json", "--quiet")
    assert json.loads(out)["scores"] == 20
    run = tmp_path / "run.trec"
    run.write_text("".join(f"q0-{place} Q0 d1-{place} 1 1.0 mine\n" for place in range(5)))
    build[build.index(output)] = tmp_path / "other"
    lists = ["--run", run, "--bm25", "--retriever", "bm25:k1=0.9,b=0.4", "--choice", "random", "--max-positives", 1]
    code, out, err = st_wkl(*build, *lists, "--plot", tmp_path / "report.png", "--json", "--quiet")
    assert code == 0, err
    assert set(json.loads(out)["candidates"]["sources"]) == {"bm25", "bm25-k1-0.9-b-0.4", "mine"}
    assert json.loads(out)["selection"]["choice"] == "random"
    assert (tmp_path / "report.png").stat().st_size > 1_000
    code, _, err = st_wkl("scores", "info", "--store", tmp_path / "nowhere.sqlite3")
    assert code == 1
    assert "There is no score store" in err


def test_help_needs_no_heavy_import() -> None:
    """`--help` of every command is how people find their way; it must come at once."""
    code = (
        "import sys\n"
        "from tests.helpers.command import CliRunner\n"
        "from st_wkl.cli import app\n"
        "for command in ([], ['demo'], ['build'], ['train'], ['evaluate']):\n"
        "    assert CliRunner().invoke(app, [*command, '--help']).exit_code == 0\n"
        "assert not {'torch', 'mteb', 'datasets', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_finished_build_says_so_and_another_is_refused(
    beir_folder: Path, cross_encoder_onnx_path: Path, tmp_path: Path
) -> None:
    """The same line is no mistake: it goes on, if only to say that all is there. Another dataset stays as it is."""
    build = ["build", beir_folder, "--teacher", cross_encoder_onnx_path, "--output", tmp_path / "scored", "--quiet"]
    build += ["--store", tmp_path / "scores.sqlite3", "--num-negatives", 3]
    code, first, err = st_wkl(*build, "--limit", 4)
    assert code == 0, err
    there = {path: path.stat().st_mtime_ns for path in (tmp_path / "scored").iterdir()}
    assert st_wkl(*build, "--limit", 4, "--plot", tmp_path / "plot.png")[:2] == (0, first)
    assert (tmp_path / "plot.png").is_file()
    for other, told in ((["--limit", 4, "--seed", 3], "another selection"), (["--limit", 5], "other queries")):
        code, _, err = st_wkl(*build, *other)
        assert code == 1
        assert f"holds a dataset that was made {'with' if 'another' in told else 'from'} {told}" in err
    code, _, err = st_wkl(*build[:-1], 2, "--limit", 4)
    assert "another --num-negatives" in err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "scored").iterdir()} == there


def test_a_cross_encoder_gets_its_prompt(tiny_bert_path: Path, tmp_path: Path) -> None:
    """What Python and a configuration can set, the command line can; another class's prompt is refused."""
    builder = DistillationDatasetBuilder(small_collection(), WordOverlap(), num_negatives=4, store=":memory:")
    scored = builder.build(show_progress=False).save_to_disk(tmp_path / "scored")
    make_student("cross-encoder", tiny_bert_path).save_pretrained(str(tmp_path / "tiny"))
    train = ["train", scored, "--student", tmp_path / "tiny", "--output", tmp_path / "student", "--epochs", 0.1]
    code, out, err = st_wkl(*train, "--pair-prompt", "Judge: ", "--json", "--quiet")
    assert code == 0, err
    assert json.loads(out)["prompts"] == {"pair": "Judge: "}
    code, _, err = st_wkl(*train, "--query-prompt", "query: ")
    assert code == 1
    assert "by the names pair, got 'query'" in err


def test_ctrl_c_promises_what_the_command_keeps(
    beir_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation without a cache has nothing to go on from; hours of scores have."""

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("st_wkl.data.collection.Collection.load", stop)
    monkeypatch.setattr("st_wkl.evaluation.evaluate", stop)
    build = ("build", beir_folder, "--teacher", "t", "--output", tmp_path / "o")
    cached = ("evaluate", "student", beir_folder, "--cache", tmp_path / "kept")
    for command, again in ((build, "goes on from here"), (cached, "goes on from here"), (cached[:3], "starts anew")):
        code, _, err = st_wkl(*command)
        assert (code, err.splitlines()[-1]) == (130, f"stopped; the same command {again}")


def test_an_interval_that_there_is_not_is_null() -> None:
    """A single query has no interval, and JSON no infinity: what reads the answer would stop at the word."""
    assert _json({"difference": [0.1, -math.inf, (math.inf, 2)], "p": None}) == {
        "difference": [0.1, None, [None, 2]],
        "p": None,
    }
