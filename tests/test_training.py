"""distill(): the trained student, the record beside it, and the errors before any work."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from st_wkl import MarginKL, distill
from st_wkl.data.builder import DistillationDatasetBuilder
from st_wkl.data.dataset import DistillationDataset
from st_wkl.training import RECORD_FILE, TrainingRecord, default_arguments
from tests.test_package import small_collection


class WordOverlap:
    """A teacher that counts shared words: no model, yet scores that rank."""

    identity = {"model": "word-overlap"}  # noqa: RUF012

    def score(self, pairs: list[tuple[str, str]]) -> np.ndarray:
        return np.array([3.0 * len({*q.split()} & {*d.split()}) for q, d in pairs], dtype=np.float32)


@pytest.fixture(scope="module")
def dataset() -> DistillationDataset:
    builder = DistillationDatasetBuilder(small_collection(), WordOverlap(), num_negatives=4, store=":memory:")
    return builder.build(show_progress=False)


def test_distilled_student_is_saved_with_its_record(
    dataset: DistillationDataset, static_student_path: Path, tmp_path: Path
) -> None:
    """A student whose making is not written down cannot be reproduced, compared or published."""
    student = distill(static_student_path, dataset, output_dir=tmp_path / "student")
    loaded = SentenceTransformer(str(tmp_path / "student"))
    assert (loaded.encode(["do cats like water"]) == student.encode(["do cats like water"])).all()
    untrained = SentenceTransformer(str(static_student_path))
    assert not (untrained.encode(["do cats like water"]) == student.encode(["do cats like water"])).all()
    record = TrainingRecord.load(tmp_path / "student")
    assert record.student == static_student_path.name
    assert record.loss == "WeightedKLDistillationLoss"
    assert record.loss_config["gamma"] == 5.0
    assert "SIGIR" in record.loss_citation
    assert record.teacher == {"model": "word-overlap"}
    assert record.dataset["rows_trained"] == len(dataset.to_columns())
    assert record.arguments["learning_rate"] == 3e-2
    for file in (RECORD_FILE, "README.md"):
        content = (tmp_path / "student" / file).read_text(encoding="utf-8")
        assert str(tmp_path) not in content
        assert "word-overlap" in content


def test_loss_and_arguments_can_be_the_users(
    dataset: DistillationDataset, static_student_path: Path, tmp_path: Path
) -> None:
    """One call must not mean one way: every part can be replaced by what the user already has."""
    student = SentenceTransformer(str(static_student_path))
    args = default_arguments(student, tmp_path / "run")
    args.max_steps = 1
    distill(student, dataset, lambda model: MarginKL(model, pairs="all"), args, output_dir=tmp_path / "student")
    record = TrainingRecord.load(tmp_path / "student")
    assert (record.loss, record.loss_config["pairs"]) == ("MarginKL", "all")


def test_transformers_get_another_learning_rate(minilm_path: Path, tmp_path: Path) -> None:
    """The rate that a lookup table needs destroys a transformer within a few steps."""
    assert default_arguments(SentenceTransformer(str(minilm_path)), tmp_path).learning_rate == 2e-5


def test_nothing_is_overwritten(dataset: DistillationDataset, static_student_path: Path, tmp_path: Path) -> None:
    """A folder that holds something may be last week's best student."""
    (tmp_path / "keep.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(FileExistsError, match="is not empty"):
        distill(static_student_path, dataset, output_dir=tmp_path)
    assert (tmp_path / "keep.txt").read_text(encoding="utf-8") == "mine"


def test_damaged_records_are_told_from_missing_ones(tmp_path: Path) -> None:
    """The remedies differ: a stock-trained student never had a record, a damaged one lost it."""
    with pytest.raises(FileNotFoundError, match="only students that `distill` saved"):
        TrainingRecord.load(tmp_path)
    for content in ('{"student": "x"', json.dumps({"student": "x"})):
        (tmp_path / RECORD_FILE).write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match="is damaged or from another version"):
            TrainingRecord.load(tmp_path)
