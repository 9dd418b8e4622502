"""The moving average of the student: its weights, its place in a checkpoint, and its scores in the target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from st_wkl.losses import InBatchContrastiveLoss, MarginKL, WeightedKLDistillationLoss
from st_wkl.methods.moving_average import MovingAverageCallback, MovingAverageLoss
from tests.helpers.students import (
    column_rows,
    features_and_labels,
    listwise_batch,
    make_student,
    one_score,
    ragged_rows,
    trained,
    weights,
)


def test_the_average_is_that_of_the_weights(tiny_bert_path: Path, tmp_path: Path) -> None:
    """Step by step with the published warm-up; an average of anything else would still look like a model."""
    model = make_student("dense", tiny_bert_path)
    expected = weights(model)
    average = MovingAverageCallback(model, decay=0.2)
    loss = WeightedKLDistillationLoss(model)
    arguments = {"max_steps": 1}
    for _ in range(2):
        # Each is one step, so the warm-up gives min(0.2, 2/11).
        trained(
            "dense", model, loss, tmp_path, Dataset.from_list(ragged_rows(6)), callbacks=[average], arguments=arguments
        )
        now = weights(model)
        expected = {name: value + (1 - 2 / 11) * (now[name] - value) for name, value in expected.items()}
    for name, value in average.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in average.model.parameters())


@pytest.mark.parametrize("kind", ["dense", "sparse", "multi-vector"])
@pytest.mark.parametrize("layout", ["lists", "columns"])
def test_the_target_is_the_mixture(kind: str, layout: str, tiny_bert_path: Path) -> None:
    """(1 − w) · t/τ_t + w · a/τ_s: with a weight of 1 the teacher is the average alone, and equal students lose 0."""
    model = make_student(kind, tiny_bert_path).double()
    average = MovingAverageCallback(make_student(kind, tiny_bert_path, seed=1).double())
    with torch.no_grad():
        for parameter in average.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    loss = WeightedKLDistillationLoss(model, gamma=0, alpha=0, teacher_temperature=2.0, student_temperature=0.2)
    rows = ragged_rows() if layout == "lists" else column_rows()
    if layout == "lists":
        batch = listwise_batch(model, kind, rows)
    else:
        from sentence_transformers.base.data_collator import BaseDataCollator

        batch = features_and_labels(BaseDataCollator(model.preprocess), rows, kind, model)
    found = MovingAverageLoss(loss, average, weight=0.3)(*batch).item()
    mixed = []
    for row in rows:
        texts = row["documents"] if layout == "lists" else [row[k] for k in ("positive", "negative_1", "negative_2")]
        teacher = torch.tensor(row["scores" if layout == "lists" else "label"], dtype=torch.float64)
        own = torch.stack([one_score(average.model, kind, row["query"], text).detach() for text in texts]).double()
        student = torch.stack([one_score(model, kind, row["query"], text) for text in texts]).double()
        target = (0.7 * teacher / 2.0 + 0.3 * own.view(-1) / 0.2).log_softmax(dim=0)
        mixed.append((target.exp() * (target - (student.view(-1) / 0.2).log_softmax(dim=0))).sum())
    assert found == pytest.approx(torch.stack(mixed).mean().item(), rel=1e-5)
    same = MovingAverageLoss(loss, MovingAverageCallback(model), weight=1.0)
    if kind == "dense":
        assert same(*batch).item() == pytest.approx(0, abs=1e-6)
    assert MovingAverageLoss(loss, average, weight=0)(*batch).item() == loss(*batch).item()
    model.eval()
    assert MovingAverageLoss(loss, average)(*batch).item() == loss(*batch).item(), "evaluation knows the teacher only"


def test_a_resumed_run_has_the_same_average(tiny_bert_path: Path, tmp_path: Path) -> None:
    """An average that starts anew after a crash would be another teacher from there on."""

    def run(folder: Path, resume: bool = False, **arguments: Any) -> Any:
        model = make_student("dense", tiny_bert_path)
        average = MovingAverageCallback(model, decay=0.5)
        loss = MovingAverageLoss(MarginKL(model), average)
        from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

        from st_wkl import ListwiseCollator

        args = SentenceTransformerTrainingArguments(
            output_dir=str(folder), max_steps=4, per_device_train_batch_size=3, save_steps=1, report_to="none",
            disable_tqdm=True, dataloader_pin_memory=False, learning_rate=1e-3, **arguments,
        )  # fmt: skip
        trainer = SentenceTransformerTrainer(
            model,
            args,
            Dataset.from_list(ragged_rows(9)),
            loss=loss,
            data_collator=ListwiseCollator(model),
            callbacks=[average],
        )
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
        return weights(model), weights(average.model)

    whole = run(tmp_path)
    resumed = run(tmp_path, resume=True)
    for expected, found in zip(whole, resumed, strict=True):
        assert all(torch.equal(value, found[name]) for name, value in expected.items())
    (tmp_path / "checkpoint-2" / "moving_average.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="so the average is not known"):
        run(tmp_path, resume=True)


def test_bad_input(tiny_bert_path: Path) -> None:
    """Said when it is put together."""
    model = make_student("dense", tiny_bert_path)
    with pytest.raises(ValueError, match="decay must be within"):
        MovingAverageCallback(model, decay=1.0)
    average = MovingAverageCallback(model)
    with pytest.raises(ValueError, match="weight must be within"):
        MovingAverageLoss(MarginKL(model), average, weight=2.0)
    with pytest.raises(TypeError, match="takes a loss over candidate lists"):
        MovingAverageLoss(InBatchContrastiveLoss(model), average)  # type: ignore[arg-type]
    config = MovingAverageLoss(MarginKL(model), average).get_config_dict()
    assert (config["loss"], config["moving_average_weight"], config["pairs"]) == ("MarginKL", 0.5, "positive-negative")
