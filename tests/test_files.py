"""Outputs of processes that are killed at any file operation, and of two processes at once."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from st_wkl import distill
from st_wkl.data.dataset import DistillationDataset
from st_wkl.files import holds_nothing, owned, replacing, replacing_folder, write_text
from tests.helpers.animals import small_collection, write_beir
from tests.helpers.command import st_wkl
from tests.helpers.students import make_student
from tests.helpers.training import arguments
from tests.training.conftest import dataset  # noqa: F401 - a fixture

_OPERATIONS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")


def in_child(work: Any, folder: Path, kill_at: int | None = None) -> int:
    """Do some work in a process that is killed at its n-th file operation under a folder."""
    count = folder.parent.with_suffix(".count")
    if pid := os.fork():
        status = os.waitpid(pid, 0)[1]
        assert status == (0 if kill_at is None else signal.SIGKILL), status
        return int(count.read_text())
    done = 0

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal done
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (writes or event in _OPERATIONS) and str(folder) in " ".join(map(str, args)):
            done += 1
            if done == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        torch.set_num_threads(1)
        count.write_text("0")
        sys.addaudithook(watch)
        work()
        count.write_text(str(done))
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(7)


@pytest.mark.slow
def test_a_training_killed_at_any_file_operation_goes_on(
    static_student_path: Path,
    dataset: DistillationDataset,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Three places needed a person: before it is written whose a folder is, and while checkpoints are removed."""

    def train(output: Path) -> None:
        student = SentenceTransformer(str(static_student_path), device="cpu")
        args = arguments(student, tmp_path, max_steps=4, save_steps=2, use_cpu=True)
        distill(student, dataset, args=args, output_dir=output, resume=True)

    def state(output: Path) -> set[str]:
        return {str(path.relative_to(output)) for path in output.rglob("*")}

    total = in_child(lambda: train(tmp_path / "whole" / "s"), tmp_path / "whole" / "s")
    assert total > 20
    expected = load_file(tmp_path / "whole" / "s" / "model.safetensors")
    for point in sorted({2, 4, 5, total // 3, total // 2, 2 * total // 3, total - 2, total}):
        output = tmp_path / str(point) / "s"
        in_child(lambda: train(output), output, point)  # noqa: B023 - is called at once
        in_child(lambda: train(output), output)  # noqa: B023
        found = load_file(output / "model.safetensors")
        assert all((found[name] == value).all() for name, value in expected.items()), point
        assert state(output) == state(tmp_path / "whole" / "s"), point
        assert [path.name for path in output.parent.iterdir()] == ["s"], point


# Of each command the share of its operations that are tried, 25 in all; between them lie all kinds of files.
_TRIED = {
    "build": (0.08, 0.25, 0.4, 0.55, 0.7, 0.8, 0.9, 1.0),
    "train": (0.02, 0.06, 0.12, 0.25, 0.4, 0.55, 0.7, 0.75, 0.8, 0.85, 0.95, 1.0),
    "run": (0.03, 0.15, 0.6, 0.8, 0.97),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", _TRIED)
def test_a_command_killed_at_a_file_operation_goes_on_by_the_same_line(
    name: str,
    dataset: DistillationDataset,  # noqa: F811
    tiny_bert_path: Path,
    tmp_path: Path,
) -> None:
    """A finished build that lacked its picture was refused; what is half done must be nobody's business."""
    collection = small_collection()
    collection.qrels["dev"] = {query: collection.qrels["test"][query] for query in list(collection.qrels["test"])[:8]}
    beir, store = write_beir(collection, tmp_path / "animals"), tmp_path / "scores.sqlite3"
    make_student("dense", tiny_bert_path).save_pretrained(str(tmp_path / "tiny"))
    dataset.save_to_disk(tmp_path / "scored")
    teacher = "packaged:ms-marco-MiniLM-L12-v2"
    lines: dict[str, list[Any]] = {
        "build": ["build", beir, "--teacher", teacher, "--max-length", 24, "--num-negatives", 3, "--store", store],
        "train": ["train", tmp_path / "scored", "--student", tmp_path / "tiny", "--epochs", 1, "--batch-size", 16],
        "run": ["run", tmp_path / "run.yaml"],
    }
    lines["build"] += ["--limit", 12]
    lines["train"] += ["--lora", "--dev", beir]
    (tmp_path / "run.yaml").write_text(
        f"collection: {{source: {beir}, limit: 12}}\ncandidates: {{num_negatives: 3}}\noutput: run\n"
        f"teacher: {{model: '{teacher}', max_length: 24, store: {store}}}\nstudent: {{model: {tmp_path / 'tiny'}}}\n"
        "training: {num_train_epochs: 1, per_device_train_batch_size: 6, save_steps: 1}\nevaluation: {split: dev}\n"
    )

    def work(folder: Path) -> None:
        picture = ["--plot", folder / "picture.png"] if name == "build" else []
        code, _, err = st_wkl(*lines[name], *picture, "--output", folder / "o", "--quiet")
        assert code == 0, err

    def state(folder: Path) -> dict[str, Any]:
        files = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
        same = (".safetensors", ".parquet", ".gz", ".png", "provenance.json")
        return {name: path.read_bytes() if name.endswith(same) else None for name, path in files.items()}

    whole = tmp_path / "whole" / "w"
    work(tmp_path / "warm")  # what is imported and fetched at first need, the children have
    total = in_child(lambda: work(whole), whole)
    for point in sorted({max(1, round(share * total)) for share in _TRIED[name]}):
        folder = tmp_path / str(point) / "w"
        in_child(lambda: work(folder), folder, point)  # noqa: B023 - is called at once
        in_child(lambda: work(folder), folder)  # noqa: B023
        assert state(folder) == state(whole), point
    work(whole)


def hold(output: Path, ready: Any, end: Any) -> None:
    with owned(output):
        ready.set()
        end.wait(60)


def test_a_second_process_is_told_of_the_first(tmp_path: Path) -> None:
    """Two trainings into one folder both finished, or one died of a file that the other had replaced."""
    context = multiprocessing.get_context("fork")
    ready, end = context.Event(), context.Event()
    output = tmp_path / "made" / "by" / "it"
    process = context.Process(target=hold, args=(output, ready, end))
    process.start()
    assert ready.wait(60)
    with pytest.raises(FileExistsError, match=rf"at work in .*it \(process {process.pid}\)"), owned(output):
        pass
    end.set()
    process.join()
    assert list(tmp_path.iterdir()) == [], "nothing is left of it, not even its parents"
    with owned(output):
        output.mkdir()
    assert output.is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    [
        "build c --teacher t --output o",
        "train d --student s --output o",
        "run c.yaml --output o",
        "evaluate m t --output o",
        "report r --output o",
        "demo --output o",
        "card o after=r",
        "push o me/it",
        "init o",
        "leaderboard prepare s --org me --output o",
        "scores export o",
    ],
)
def test_no_command_works_where_another_process_does(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card could be written into a student that was being trained, a page or a demo by two at once."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("output: x\n")
    context = multiprocessing.get_context("fork")
    ready, end = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path / "o", ready, end))
    process.start()
    assert ready.wait(60)
    code, _, err = st_wkl(*line.split(), "--quiet")
    end.set()
    process.join()
    assert code == 1
    assert f"at work in {tmp_path / 'o'} (process {process.pid})" in err


def test_one_process_owns_an_output_as_often_as_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command owns what the functions that it calls own again; a folder beside which nobody may write is its own."""
    refused = []

    def try_it() -> None:
        try:
            with owned(tmp_path / "o"):
                pass
        except FileExistsError as error:
            refused.append(str(error))

    def other_thread() -> None:
        thread = threading.Thread(target=try_it)
        thread.start()
        thread.join()

    with owned(tmp_path / "o"), owned(tmp_path / "o"):
        other_thread()
    assert len(refused) == 1
    (tmp_path / "o").mkdir()
    real = os.open

    def no_file_beside(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if str(path).endswith(".lock"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", no_file_beside)
    with owned(tmp_path / "o"):
        other_thread()
    assert len(refused) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["o"]


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    """Temporary files of killed processes lay beside the results for good; those of a living one stay."""
    (tmp_path / ".results.json.abc.part").write_text("half")
    (tmp_path / ".results.abc.part").mkdir()
    with replacing(tmp_path / "results.json") as living:
        write_text(tmp_path / "results.json", "whole")
        assert living.is_file()
        living.write_text("later")
    assert (tmp_path / "results.json").read_text() == "later"
    with replacing_folder(tmp_path / "results") as new:
        (new / "table").write_text("1")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["results", "results.json", "table"]
    with pytest.raises(RuntimeError, match="full"), replacing_folder(tmp_path / "results"):
        raise RuntimeError("full")
    assert (tmp_path / "results" / "table").read_text() == "1"
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / ".run.json.abc.part").touch()
    assert holds_nothing(tmp_path / "begun")
    assert not holds_nothing(tmp_path / "results")


def test_a_long_name_leaves_room_for_what_is_written_beside_it(tmp_path: Path) -> None:
    """A name of 250 bytes is one that a disk takes; what is written beside it first must not be longer."""
    for name in ("n" * 250, "é" * 125):
        with owned(tmp_path / name), replacing_folder(tmp_path / name) as folder:
            write_text(folder / name, "kept")
        assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [name]
        (tmp_path / name / name).unlink()
        (tmp_path / name).rmdir()


def test_what_was_left_of_a_complete_output_is_removed_by_its_next_owner(tmp_path: Path) -> None:
    """Killed after a build or a merge had its name, the workspace stayed: nobody writes a complete output again."""
    (tmp_path / "o").mkdir()
    (tmp_path / ".o.abc.part" / "new").mkdir(parents=True)
    (tmp_path / ".other.abc.part").mkdir()
    with owned(tmp_path / "o"):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".o.lock", ".other.abc.part", "o"]


def test_a_full_disk_names_the_file_that_a_person_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message named no file, or a hidden one that was gone when somebody looked for it."""
    full = OSError(28, "No space left on device")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(full))
    with pytest.raises(OSError, match=r"No space left on device: '.*/results\.json'"):
        write_text(tmp_path / "results.json", "{}")
    monkeypatch.setattr("tempfile.mkstemp", lambda prefix, **_: (_ for _ in ()).throw(OSError(30, "Read-only", prefix)))
    with pytest.raises(OSError, match=r"Read-only: '.*/results\.json'"):
        write_text(tmp_path / "results.json", "{}")
