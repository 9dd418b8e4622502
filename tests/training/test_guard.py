"""Students that are worth nothing are not saved, and few rows are enough to begin with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss
from transformers import TrainerCallback

from st_wkl import MarginKL, distill
from st_wkl.data.dataset import DistillationDataset
from st_wkl.losses import MarginMSEDistillLoss, PearsonDistillLoss, WeightedKLDistillationLoss, WeightedSumLoss
from st_wkl.training import default_arguments
from tests.helpers.students import gradients, listwise_batch, make_student, ragged_rows
from tests.helpers.training import arguments


def masked(dataset: DistillationDataset, value: float) -> DistillationDataset:
    rows = dataset.train.with_format(None)[:]
    rows["scores"] = [[*scores[:-1], value] for scores in rows["scores"]]
    return replace(dataset, train=datasets.Dataset.from_dict(rows, features=dataset.train.features))


@pytest.mark.parametrize("value", [torch.finfo(torch.float32).min, -65504.0, -1e4, 3e7])
@pytest.mark.parametrize("loss", [MarginMSEDistillLoss, PearsonDistillLoss, WeightedKLDistillationLoss])
def test_mask_values_are_no_scores(
    loss: Any, value: float, dataset: DistillationDataset, static_student_path: Path, tmp_path: Path
) -> None:
    """The lowest number of a type is what masked places are filled with; learned from, every weight was NaN."""
    student = SentenceTransformer(str(static_student_path))
    with pytest.raises(ValueError, match="is no score"):
        distill(student, masked(dataset, value), loss, arguments(student, tmp_path), output_dir=tmp_path / "student")
    assert not (tmp_path / "student").exists()
    scores = torch.tensor([[1.0, value]])
    with pytest.raises(ValueError, match="taken for a mask"):
        loss(student).loss_from_scores(torch.zeros(1, 2), scores, torch.tensor([[True, False]]), scores < 1e9)


class Spoil(TrainerCallback):
    """Does what a step that overflows does."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == state.max_steps:
            next(model.parameters()).data[0] = torch.nan


@pytest.mark.parametrize("save_steps", [1, 100])
def test_a_student_that_is_not_finite_is_not_saved(
    save_steps: int, dataset: DistillationDataset, static_student_path: Path, tmp_path: Path
) -> None:
    """A loss sees the weights of the step before: what the last step did was saved, with a card and a result."""
    student = SentenceTransformer(str(static_student_path))
    args = arguments(student, tmp_path, max_steps=1, save_steps=save_steps, learning_rate=float("inf"))
    with pytest.raises(ValueError, match=r"After step 1, \d+% of the weight .*learning_rate=inf"):
        distill(student, dataset, args=args, output_dir=tmp_path / "student")
    student = SentenceTransformer(str(static_student_path))
    args = arguments(student, tmp_path, max_steps=2, save_steps=save_steps)
    with pytest.raises(ValueError, match="After step 2, "):
        distill(student, dataset, args=args, output_dir=tmp_path / "spoilt", callbacks=[Spoil()])
    for folder in (tmp_path / "student", tmp_path / "spoilt"):
        assert not (folder / "model.safetensors").exists()
        assert not [path for path in folder.glob("checkpoints/checkpoint-2")]


class Odd(torch.nn.Module):
    """A loss that is NaN while weights and scores are fine."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.calls = model, 0

    def forward(self, features: Any, labels: Any) -> torch.Tensor:
        self.calls += 1
        value = self.model(next(iter(features)))["sentence_embedding"].sum()
        return value * torch.nan if self.calls > 2 else value


def test_a_loss_that_is_not_finite_stops_training(
    dataset: DistillationDataset, static_student_path: Path, tmp_path: Path
) -> None:
    """A trainer logs a NaN as 0, which looks like the best loss of all."""
    student = SentenceTransformer(str(static_student_path))
    with pytest.raises(ValueError, match="Odd: the loss of this batch is nan"):
        distill(student, dataset, Odd(student), arguments(student, tmp_path), output_dir=tmp_path / "student")
    scores = torch.tensor([[1.0, torch.inf]])
    with pytest.raises(ValueError, match="in row 0 of this batch are infinite"):
        MarginKL(student)._check_student(scores)


@pytest.mark.parametrize("change", [{"learning_rate": 0.0}, {"num_train_epochs": 0}])
def test_training_that_changed_nothing_is_said(
    change: dict[str, Any],
    dataset: DistillationDataset,
    static_student_path: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The student that was given came back as the trained one."""
    student = SentenceTransformer(str(static_student_path))
    distill(student, dataset, args=arguments(student, tmp_path, **change), output_dir=tmp_path / "student")
    assert "Training changed no weight of the student" in caplog.text


@pytest.mark.parametrize(("changes", "said"), [({"max_steps": 1}, True), ({"max_steps": 1, "warmup_steps": 0}, False)])
def test_one_step_of_warm_up_is_said_before_it(
    changes: dict[str, Any],
    said: bool,
    dataset: DistillationDataset,
    tiny_bert_path: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A transformer's first step has the learning rate 0: with no other, the teacher's work was for nothing."""
    student = make_student("dense", tiny_bert_path)
    args = arguments(student, tmp_path, **changes)
    with pytest.raises(RuntimeError, match="started"):
        distill(student, dataset, args=args, output_dir=tmp_path / "student", callbacks=[Started()])
    assert ("its learning rate is 0" in caplog.text) == said


class Started(TrainerCallback):
    """Stops a training that begins."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        raise RuntimeError("started")


def test_a_dozen_rows_are_enough(static_student_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It refused after the teacher's work, and its advice took the learning rate along: the student did not move."""
    few = datasets.Dataset.from_list(ragged_rows(12))
    untrained = SentenceTransformer(str(static_student_path))
    before = untrained.encode(["the of and"])

    def moved(name: str, args: Any = None) -> float:
        student = SentenceTransformer(str(static_student_path))
        made = distill(student, few, args=args, output_dir=tmp_path / name)
        return float(abs(made.student.encode(["the of and"]) - before).max())

    by_default = moved("defaults")
    assert by_default > 0.01
    assert "12 rows make 3 steps of training" in caplog.text
    stock = SentenceTransformerTrainingArguments(
        str(tmp_path / "x"), per_device_train_batch_size=12, report_to="none", use_cpu=True
    )
    assert moved("stock", stock) == pytest.approx(by_default, rel=0.5)
    assert "at which a static student does not move" in caplog.text
    assert stock.learning_rate == 5e-5, "the user's arguments are not ours to change"
    chosen = default_arguments(untrained, tmp_path, learning_rate=1e-3)
    assert moved("chosen", chosen) < by_default / 5, "a rate that was chosen stays"


@pytest.mark.parametrize("mini_batch_size", [None, 3])
def test_a_cut_student_is_trained_as_it_is_used(
    mini_batch_size: int | None, tiny_bert_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Trained on all dimensions and used with the first of them, it is another student than was trained."""
    from st_wkl.training.students import check_loss

    rows = ragged_rows()
    cut = make_student("dense", tiny_bert_path)
    cut.truncate_dim = 8
    features, labels = listwise_batch(cut, "dense", rows)
    loss = MarginKL(cut, mini_batch_size=mini_batch_size)
    value, _ = gradients(loss, cut, features, labels)
    queries = cut.encode_query([row["query"] for row in rows], convert_to_tensor=True).clone()
    assert queries.shape[1] == 8
    documents = list(dict.fromkeys(text for row in rows for text in row["documents"]))
    embedded = cut.encode_document(documents, convert_to_tensor=True).clone()
    expected = MarginKL(cut).compute_loss_from_embeddings([queries, embedded], labels)
    assert value == pytest.approx(expected.item(), abs=1e-5)
    assert loss.get_config_dict()["truncate_dim"] == 8
    summed = WeightedSumLoss(cut, [(1.0, MarginKL(cut))], mini_batch_size=mini_batch_size)
    assert gradients(summed, cut, features, labels)[0] == pytest.approx(value, abs=1e-5)
    check_loss(DistillKLDivLoss(cut), cut)
    assert "used with the first 8 (truncate_dim)" in caplog.text
