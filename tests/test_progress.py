"""How far a long step is must be readable in a terminal, in a log file, and beside what the trainer says."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer

from st_wkl import distill, progress
from st_wkl.data.builder import DistillationDatasetBuilder
from st_wkl.training import default_arguments
from st_wkl.training.guard import ProgressLine
from tests.helpers.animals import WordOverlap, small_collection


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Have a line at every step, and return what is logged."""
    monkeypatch.setattr(progress, "_PAUSE", 0.0)
    caplog.set_level(logging.INFO, "st_wkl")
    return caplog


def test_a_log_gets_whole_lines(often: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    """A bar in a file is one line of a thousand carriage returns, and ends in the middle of a message."""
    with progress.progress(desc="Scoring", total=4, unit=" pairs", initial=1) as bar:
        bar.set_postfix_str("2 of 4")
        bar.update()
    assert list(progress.progress([7], desc="Reading", unit=" rows")) == [7]
    lines = [record.getMessage() for record in often.records]
    assert lines[0].startswith("Scoring:  50% 2/4 [")
    assert lines[0].endswith(", 2 of 4]")
    assert lines[-1].startswith("Reading: 100% 1/1 [")
    assert not any("\r" in line for line in lines)
    assert capsys.readouterr() == ("", "")
    assert list(progress.progress([7], desc="Quiet", disable=True)) == [7]
    assert "Quiet" not in often.text


def test_a_short_step_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """A line for each of a hundred steps of a second would bury the one that matters."""
    caplog.set_level(logging.INFO, "st_wkl")
    assert list(progress.progress([1, 2], desc="Short")) == [1, 2]
    assert caplog.text == ""


def test_training_is_one_line(
    often: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], static_student_path: Path, tmp_path: Path
) -> None:
    """The trainer's dictionaries, one a step, are for machines; what matters in them is the loss and the agreement."""
    student = SentenceTransformer(str(static_student_path), device="cpu")
    builder = DistillationDatasetBuilder(small_collection(), WordOverlap(), num_negatives=4, store=":memory:")
    options = {"disable_tqdm": True, "num_train_epochs": 2, "logging_steps": 1, "save_strategy": "no"}
    args = default_arguments(student, tmp_path / "checkpoints", **options)
    distill(
        student,
        builder.build(show_progress=False),
        None,
        args,
        output_dir=tmp_path / "student",
        callbacks=[ProgressLine()],
    )
    lines = [record.getMessage() for record in often.records if record.getMessage().startswith("Training:")]
    assert "100%" in lines[-1]
    assert "loss " in lines[-1]
    assert "agreement with the teacher" in lines[-1]
    assert "{" not in capsys.readouterr().out
