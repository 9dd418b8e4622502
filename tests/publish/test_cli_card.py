"""The command line writes the same card as the function, and says what is wrong with its arguments."""

from __future__ import annotations

from pathlib import Path

import pytest

from st_wkl.cli import app
from tests.helpers.cards import record, results
from tests.helpers.command import CliRunner
from tests.publish.test_model_card import front_matter


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Return a folder with a student's record and the results before and after."""
    (tmp_path / "student").mkdir()
    record().save(tmp_path / "student")
    results("potion", 0.6).save(tmp_path / "before.json")
    results("student", 0.7).save(tmp_path / "after.json")
    return tmp_path


def test_the_card_is_written_from_the_files(files: Path) -> None:
    """Record, both columns, their paired difference, the licence: from files alone."""
    columns = [f"{name}={files / name}.json" for name in ("before", "after")]
    licences = ["--licence", "student=mit", "--licence", "teacher=mit", "--licence", "data=cc-by-4.0"]
    run = CliRunner().invoke(app, ["card", str(files / "student"), *columns, *licences, "--command", "make student"])
    assert run.exit_code == 0, run.output
    text = (files / "student/README.md").read_text()
    for part in ("`WeightedKLDistillationLoss`: gamma `2`", "| before | after |", "+0.1000 nDCG@10", "make student"):
        assert part in text
    assert front_matter(files / "student/README.md")["license"] == "cc-by-4.0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["after.json"], "must be a name and a value, such as before=results.json"),
        (["after=after.json", "after=before.json"], "'after' is given twice"),
        (["after=after.json", "--licence", "weights=mit"], "name one of student, teacher, data"),
        (["after=nothing.json"], "nothing.json"),
    ],
)
def test_mistakes_are_named(files: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str) -> None:
    """Nothing is written, and the message says which argument to change."""
    monkeypatch.chdir(files)
    run = CliRunner().invoke(app, ["card", "student", *arguments])
    assert run.exit_code == 1
    assert message in run.output
    assert not (files / "student/README.md").exists()


def test_a_truncated_results_file_is_named(files: Path) -> None:
    """Half a file must not become half a card; the file itself stays for whoever wants to look."""
    path = files / "after.json"
    path.write_text(path.read_text()[:100])
    run = CliRunner().invoke(app, ["card", str(files / "student"), f"after={path}"])
    assert run.exit_code == 1
    assert "damaged or incomplete" in run.output
    assert path.exists()
