"""A benchmark by name takes hours and is killed: it must be found, foreseen, gone on with, and be MTEB's own."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mteb
import pytest

from st_wkl.evaluation import Results, estimate, evaluate
from st_wkl.evaluation.benchmark import size_of, smallest_first
from st_wkl.evaluation.tasks import CollectionTask, resolve_tasks
from st_wkl.publish.leaderboard import check_results, prepare
from tests.helpers.command import st_wkl
from tests.helpers.tiny import collection

CARD = """---
configs:
- {config_name: corpus, data_files: [{split: train, path: corpus.jsonl}]}
- {config_name: queries, data_files: [{split: train, path: queries.jsonl}]}
- {config_name: qrels, data_files: [{split: train, path: qrels.jsonl}]}
---
"""
NANO = tuple(task.metadata.name for task in mteb.get_benchmark("NanoBEIR").tasks)


def write_task(folder: Path, name: str, seed: int, documents: int = 12, *, commit: bool = True) -> None:
    """Write the data of one of MTEB's tasks as `snapshot_download` does, with the commit that every file is of."""
    rng = random.Random(seed)
    words = "cat dog fish bird tree house river stone cloud bread".split()  # noqa: SIM905
    texts = {f"d{n}": " ".join(rng.choices(words, k=8)) for n in range(documents)}
    rows = {
        "corpus.jsonl": [{"_id": key, "text": text} for key, text in texts.items()],
        "queries.jsonl": [{"_id": f"q{n}", "text": " ".join(rng.choices(words, k=3))} for n in range(4)],
        "qrels.jsonl": [{"query-id": f"q{n}", "corpus-id": f"d{n}", "score": 1} for n in range(4)],
    }
    place = folder / name
    notes = place / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    (place / "README.md").write_text(CARD)
    for file, lines in rows.items():
        (place / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
    for file in ("README.md", *rows) if commit else ():
        (notes / f"{file}.metadata").write_text(f"{mteb.get_task(name).metadata.revision}\netag\n0.0\n")


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the data of NanoBEIR, as MTEB reads it."""
    folder = tmp_path_factory.mktemp("nano")
    for seed, name in enumerate(NANO):
        write_task(folder, name, seed)
    return folder


def test_sizes_are_known_before_anything_is_loaded() -> None:
    """Hours are foreseen by sizes; the smallest task comes first, so that what cannot work fails in seconds."""
    beir = resolve_tasks("BEIR")
    sizes = {task.metadata.name: size_of(task) for task in beir}
    assert sizes["MSMARCO"] > 500 * sizes["NFCorpus"] > 1e9
    order = smallest_first(beir)
    assert [size_of(task) for task in order] == sorted(size_of(task) for task in beir)
    assert not any(task.data_loaded for task in beir)
    tiny = CollectionTask(collection(), "test")
    read = [*collection().documents.values(), *collection().queries.values()]
    assert size_of(tiny) == sum(map(len, read))
    assert size_of(mteb.get_task("NFCorpus"), 10) > size_of(mteb.get_task("NFCorpus"), 1) > 0
    assert all(size_of(task) for task in resolve_tasks("MTEB(eng, v2)"))


@pytest.mark.parametrize(
    ("asked", "words"),
    [("NanoBIER", "did you mean NanoBEIR"), ("MTEB(eng v2)", "MTEB(eng, v2)"), ("beir", "did you mean BEIR")],
)
def test_a_misspelt_benchmark_has_its_nearest_names(asked: str, words: str) -> None:
    """MTEB has 150 benchmarks, and names with commas and brackets."""
    with pytest.raises(ValueError, match="neither a folder here nor an MTEB task or benchmark") as error:
        resolve_tasks(asked)
    assert words in str(error.value)


def test_private_tasks_are_named_and_left_out(caplog: Any) -> None:
    """They cannot be run here; a benchmark without them, unsaid, would be another benchmark."""
    names = [task.metadata.name for task in resolve_tasks("RTEB(eng, beta)")]
    assert "Code1Retrieval" not in names
    assert len(names) == 15
    assert "Code1Retrieval" in caplog.text
    assert "evaluation request" in caplog.text
    with pytest.raises(ValueError, match=r"Code1Retrieval: private, so only MTEB's maintainers can run it"):
        resolve_tasks("Code1Retrieval")
    with pytest.raises(ValueError, match="private"):
        resolve_tasks(["SciFact", "Code1Retrieval"])


def test_data_of_a_folder_are_the_hubs_only_if_it_says_so(tmp_path: Path, student: Any) -> None:
    """Numbers of other texts under MTEB's revision would go onto the leaderboard."""
    names = ["NanoArguAnaRetrieval", "NanoSCIDOCSRetrieval"]
    write_task(tmp_path, names[0], 1)
    write_task(tmp_path, names[1], 2, commit=False)
    ours = evaluate(student, names, datasets=tmp_path, cache=tmp_path / "cache", name="lab/x", show_progress=False)
    revisions = [scores.dataset_revision for scores in ours.tasks]
    assert [scores.task for scores in ours.tasks] == names, "in the order that was asked for"
    assert revisions[0] == mteb.get_task(names[0]).metadata.revision
    assert revisions[1].startswith("files.")
    place = next((tmp_path / "cache" / "results").glob("*/*"))
    assert [problem.split(":")[0] for problem in check_results(place)] == ["NanoSCIDOCSRetrieval.json"]
    (tmp_path / names[1] / "corpus.jsonl").write_text('{"_id": "d0", "text": "other"}\n')
    changed = resolve_tasks(names[1], datasets=tmp_path)[0].metadata.revision
    assert changed != revisions[1]
    with pytest.raises(FileNotFoundError, match=r"has no data of SciFact: no folder SciFact, mteb/scifact, scifact"):
        evaluate(student, "SciFact", datasets=tmp_path)


def test_half_a_file_is_computed_again(tmp_path: Path, student: Any) -> None:
    """A process that dies while MTEB writes leaves half a result, or rankings of which MTEB reads the first half."""
    name = "NanoArguAnaRetrieval"
    write_task(tmp_path, name, 1)

    def run() -> Results:
        return evaluate(student, name, datasets=tmp_path, cache=tmp_path / "cache", name="lab/x", show_progress=False)

    first = run()
    result = next((tmp_path / "cache" / "results").rglob(f"{name}.json"))
    rankings = next((tmp_path / "cache" / "rankings").rglob("*.json"))
    for file in (result, rankings):
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        assert run().tasks[0].per_query == first.tasks[0].per_query
        assert json.loads(file.read_text())
    for file in (rankings, result.with_name("run_settings.jsonl")):
        file.unlink()
        assert run().tasks[0].per_query == first.tasks[0].per_query
        assert file.is_file()


def test_an_estimate_keeps_what_it_has_measured(nano: Path, tmp_path: Path, static_student_path: Path) -> None:
    """Before hours of work the user hears of them; the task that told the speed need not be done again."""
    asked = ("evaluate", static_student_path, "--datasets", nano, "--cache", tmp_path / "cache", "--json", "--quiet")
    code, out, err = st_wkl(*asked, "--dry-run")
    assert code == 0, err
    found = json.loads(out)
    smallest = smallest_first(resolve_tasks("NanoBEIR"))[0].metadata.name
    assert found["done"] == [smallest] == [found["measured"]]
    assert len(found["left"]) == len(NANO) - 1
    assert found["hours"] == pytest.approx(sum(found["left"].values()) / found["speed"] / 3600)
    again = estimate(str(static_student_path), "NanoBEIR", cache=tmp_path / "cache", datasets=nano, show_progress=False)
    assert smallest in again.done
    assert again.measured != smallest
    assert f"2 tasks are done, {len(NANO) - 2} are left: about" in str(again)


@pytest.mark.slow
def test_a_killed_benchmark_ends_as_an_undisturbed_one(nano: Path, tmp_path: Path, static_student_path: Path) -> None:
    """Hours are lost, or numbers are another run's, if a benchmark cannot go on at the task where it was killed."""

    def command(place: Path) -> list[str]:
        words = [
            "evaluate",
            static_student_path,
            "--benchmark",
            "NanoBEIR",
            "--datasets",
            nano,
            "--output",
            place / "o",
        ]
        return [sys.executable, "-m", "st_wkl", *map(str, [*words, "--cache", place / "cache", "--quiet"])]

    done = subprocess.run(command(tmp_path / "whole"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rng, killed = random.Random(0), tmp_path / "killed"
    for wanted in (rng.randint(1, 4), rng.randint(5, 9)):
        process = subprocess.Popen(command(killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len([*killed.glob("cache/results/*/*/Nano*.json")]) < wanted:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    there = {path: path.stat().st_mtime_ns for path in killed.glob("cache/results/*/*/Nano*.json")}
    assert 0 < len(there) < len(NANO)
    done = subprocess.run(command(killed), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kept = [path for path, when in there.items() if path.stat().st_mtime_ns == when]
    assert len(kept) >= len(there) - 1, "all but the one that was being written are kept"
    whole, other = (Results.load(tmp_path / name / "o") for name in ("whole", "killed"))
    assert [scores.task for scores in whole.tasks] == list(NANO)
    for one, two in zip(whole.tasks, other.tasks, strict=True):
        assert (one.task, one.metrics, one.per_query) == (two.task, two.metrics, two.per_query)

    commit = "0123456789" * 4
    submission = prepare(
        static_student_path,
        [killed / "cache"],
        org="lab",
        revision=commit,
        license="mit",
        output=tmp_path / "s",
        mock=False,
    )
    assert len(submission.tasks) == len(NANO)
    assert {row.name: len(row.done) for row in submission.coverage}["NanoBEIR"] == len(NANO)
