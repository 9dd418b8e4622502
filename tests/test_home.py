"""Where files go: `~` at every entry, users without a home folder, configurations in another encoding."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from st_wkl.cli import app
from st_wkl.config import RunConfig
from st_wkl.data.collection import Collection
from st_wkl.data.cross_encoder import CrossEncoderTeacher
from st_wkl.data.dataset import DistillationDataset
from st_wkl.data.runs import read_run, write_run
from st_wkl.data.score_store import ScoreStore
from st_wkl.evaluation import Results
from st_wkl.files import cache_folder
from st_wkl.models import load_model
from st_wkl.packaged import named
from st_wkl.pipeline.stages import Parts
from st_wkl.training import TrainingRecord
from tests.helpers.command import CliRunner

FORMATS = Path(__file__).parent / "formats"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a home folder with links to what a user has; the current folder is another one."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    for name in ("collection", "teacher", "student-start", "run"):
        (tmp_path / "home" / name).symlink_to(FORMATS / name)
    return tmp_path / "home"


def test_build_writes_to_the_home_folder(home: Path) -> None:
    """`--output=~/scored`, which no shell expands, was called written: a card in a folder named `~`, and no table."""
    said = CliRunner().invoke(
        app,
        "build ~/collection --teacher=~/teacher --output=~/scored --store=~/scores.sqlite3 --max-length=16 "
        "--num-negatives=2 --quiet",
    )
    assert said.exit_code == 0, said.output
    names = {file.name for file in (home / "scored").iterdir()}
    assert names == {"train.parquet", "queries.parquet", "documents.parquet", "provenance.json", "README.md"}
    assert (home / "scores.sqlite3").is_file()
    assert not any(Path().iterdir())


def test_a_tilde_means_the_same_at_every_entry(home: Path) -> None:
    """A YAML file and a Python call have no shell."""
    dataset = DistillationDataset.load_from_disk("~/run/dataset")
    assert dataset.save_to_disk("~/again") == home / "again"
    assert len(DistillationDataset.from_hub("~/again")) == len(dataset)
    assert Collection.load("~/collection").fingerprint == Collection.from_beir("~/collection").fingerprint
    candidates = read_run("~/run/candidates.trec.gz")
    assert write_run(candidates, "~/run.trec") == home / "run.trec"
    results = Results.load("~/run/results/before.json")
    assert results.save("~/results.json") == home / "results.json"
    assert TrainingRecord.load("~/run/student").student == "student-start"
    assert load_model("~/student-start")[1] == named("~/student-start")[1] == "student-start"
    assert CrossEncoderTeacher("~/teacher", max_length=16).identity["model"] == "teacher"
    with ScoreStore("~/made/store") as store:
        store.export_parquet("~/scores.parquet", show_progress=False)
        assert store.import_parquet("~/scores.parquet", show_progress=False) == 0
    values = {"collection": {"source": "~/collection"}, "teacher": {"model": "~/teacher"}}
    config = RunConfig.from_dict({"output": "~/new", **values, "student": {"model": "~/student-start"}})
    parts = Parts(config, show_progress=False)
    assert parts.output == home / "new"
    assert parts.collection.name == "collection"
    assert parts.start == (str(home / "student-start"), "student-start")
    assert config.save("~/config.yaml") == home / "config.yaml"
    assert RunConfig.load("~/config.yaml") == config
    assert not any(Path().iterdir())


def test_without_a_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A container's user often has none; "Could not determine home directory" names no remedy."""

    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", none)
    with pytest.raises(FileNotFoundError, match="Set XDG_CACHE_HOME"):
        cache_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "st_wkl"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_standard_output_is_said(tmp_path: Path) -> None:
    """Whoever writes an answer to a full disk must not read a traceback, nor that the work failed."""
    ScoreStore(tmp_path / "store").close()
    command = [sys.executable, "-m", "st_wkl", "scores", "info", f"--store={tmp_path / 'store'}"]
    with Path("/dev/full").open("w") as full:
        said = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert said.returncode == 1
    assert "error: all is done, but the answer cannot be written" in said.stderr
    assert "Traceback" not in said.stderr


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_configuration_in_another_encoding_is_named(tmp_path: Path, encoding: str) -> None:
    """The codec's own message names neither the file nor what to do."""
    path = tmp_path / "config.yaml"
    path.write_bytes("output: Zürich\n".encode(encoding))
    with pytest.raises(ValueError, match=r"config\.yaml.*UTF-8"):
        RunConfig.load(path)
