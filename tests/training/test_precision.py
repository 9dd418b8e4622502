"""Students whose folders are in half precision: trained in float32 unless their owner says otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer

from st_wkl import distill
from st_wkl.data.dataset import DistillationDataset
from st_wkl.methods.moving_average import MovingAverageCallback
from st_wkl.record import TrainingRecord
from st_wkl.training.dev import GradedEvaluator
from st_wkl.training.lora import merge
from tests.helpers.students import CLASSES, make_student
from tests.helpers.training import KillAt, Killed, arguments

HALF = torch.bfloat16


def saved(student: Any, folder: Path) -> Path:
    student.save_pretrained(str(folder))
    return folder


def weights(student: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().float().clone() for name, value in student.state_dict().items()}


def moved(before: dict[str, torch.Tensor], student: Any) -> float:
    """Share of the weights inside of the blocks that are others than before."""
    after = weights(student)
    names = [name for name in before if "encoder.layer" in name and name.endswith("weight")]
    return sum(int((after[n] != before[n]).sum()) for n in names) / sum(before[n].numel() for n in names)


@pytest.mark.parametrize("kind", sorted(CLASSES))
def test_a_folder_in_half_precision_is_trained_in_float32(
    kind: str, tiny_bert_path: Path, dataset: DistillationDataset, tmp_path: Path
) -> None:
    """In pure bfloat16 a step of a usual learning rate is rounded away at most weights."""
    base = saved(make_student(kind, tiny_bert_path).to(HALF), tmp_path / "base")
    student = CLASSES[kind](str(base))
    assert student.dtype is HALF, "the default of the loader"
    before = weights(student)
    args = arguments(student, tmp_path, max_steps=2, warmup_steps=0, learning_rate=2e-5)
    made = distill(student, dataset, args=args, output_dir=tmp_path / "student")
    assert moved(before, made.student) > 0.9
    assert made.record.precision == {"loaded": "bfloat16", "trained": "float32", "saved": "float32"}
    again = CLASSES[kind](str(made.folder))
    assert again.dtype is torch.float32
    assert all((value == weights(made.student)[name]).all() for name, value in weights(again).items())


@pytest.mark.slow
def test_a_killed_run_goes_on_and_a_complete_one_is_known(
    tiny_bert_path: Path, dataset: DistillationDataset, tmp_path: Path
) -> None:
    """A model's revision names its number type, and a checkpoint, the best one, and rounding have to agree with it."""
    base = saved(make_student("dense", tiny_bert_path).to(HALF), tmp_path / "base")

    def run(folder: str, **options: Any) -> Any:
        args = arguments(SentenceTransformer(str(base)), tmp_path, max_steps=4, save_steps=1, learning_rate=1e-3)
        texts = {"q": "do cats like water"}, {"a": "cats like water", "b": "dogs like meat"}
        evaluator = GradedEvaluator(*texts, {"q": {"a": 1}})
        return distill(base, dataset, args=args, output_dir=tmp_path / folder, evaluator=evaluator, **options)

    whole = run("whole", save_dtype="bfloat16")
    with pytest.raises(Killed):
        run("cut", save_dtype="bfloat16", callbacks=[KillAt(3)])
    resumed = run("cut", save_dtype="bfloat16", resume=True)
    assert resumed.record.precision == {"loaded": "bfloat16", "trained": "float32", "saved": "bfloat16"}
    again = run("cut", save_dtype="bfloat16", resume=True)
    for student in (resumed.student, again.student, SentenceTransformer(str(whole.folder))):
        assert student.dtype is HALF
        assert all((value == weights(whole.student)[name]).all() for name, value in weights(student).items())
    with pytest.raises(FileExistsError, match="save_dtype"):
        run("cut", resume=True)
    with pytest.raises(ValueError, match="no number type 'int8'"):
        run("other", save_dtype="int8")
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_an_adapter_on_half_precision(tiny_bert_path: Path, dataset: DistillationDataset, tmp_path: Path) -> None:
    """Loading rounds an adapter to its base model's type: resuming, going on and merging must not."""
    base = saved(make_student("dense", tiny_bert_path).to(HALF), tmp_path / "base")

    def run(student: Path, folder: str, **options: Any) -> Any:
        args = arguments(SentenceTransformer(str(base)), tmp_path, max_steps=4, save_steps=1, learning_rate=1e-2)
        return distill(student, dataset, args=args, output_dir=tmp_path / folder, lora=True, **options)

    whole = run(base, "whole")
    with pytest.raises(Killed):
        run(base, "cut", callbacks=[KillAt(3)])
    resumed, complete = run(base, "cut", resume=True), run(base, "cut", resume=True)
    for student in (resumed.student, complete.student):
        assert all((value == weights(whole.student)[name]).all() for name, value in weights(student).items())
    assert {weight.dtype for weight in whole.student.parameters()} == {torch.float32}
    further = run(whole.folder, "further")
    text = ["do cats like water"]
    merged = SentenceTransformer(str(merge(further.folder, tmp_path / "merged")))
    assert abs(merged.encode(text) - further.student.eval().encode(text)).max() < 1e-5
    small = merge(further.folder, tmp_path / "small", save_dtype="bfloat16")
    assert SentenceTransformer(str(small)).dtype is HALF
    assert TrainingRecord.load(small).precision["saved"] == "bfloat16"
    with pytest.raises(ValueError, match="give save_dtype to"):
        run(base, "other", save_dtype="bfloat16")


@pytest.mark.parametrize("how", ["cast", "loaded"])
def test_a_wish_for_half_precision_stays(
    how: str, tiny_bert_path: Path, dataset: DistillationDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Who casts a model, or loads it in another type than it is stored in, has said what it is to be trained in."""
    base = saved(make_student("dense", tiny_bert_path), tmp_path / "base")
    student = SentenceTransformer(str(base), model_kwargs={"dtype": HALF} if how == "loaded" else None).to(HALF)
    args = arguments(student, tmp_path, max_steps=1)
    made = distill(student, dataset, args=args, output_dir=tmp_path / "student")
    assert {weight.dtype for weight in made.student.parameters()} == {HALF}
    assert made.record.precision == {"loaded": "bfloat16", "trained": "bfloat16", "saved": "bfloat16"}
    assert "was cast to bfloat16" in caplog.text


def test_static_students_and_averages_are_kept_in_float32(
    static_student_path: Path, dataset: DistillationDataset, tmp_path: Path
) -> None:
    """A static student has no configuration that names its number type; an average adds thousandths."""
    base = saved(SentenceTransformer(str(static_student_path)).to(torch.float16), tmp_path / "base")
    student = SentenceTransformer(str(base))
    average = MovingAverageCallback(student, decay=0.999)
    args = arguments(student, tmp_path, max_steps=3)
    made = distill(student, dataset, args=args, output_dir=tmp_path / "student", callbacks=[average])
    assert made.record.precision["loaded"] == "float16"
    assert {made.student.dtype, SentenceTransformer(str(made.folder)).dtype, average.model.dtype} == {torch.float32}
