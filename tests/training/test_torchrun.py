"""distill() under torchrun: two gloo processes train what one trains, and only one of them writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformerTrainingArguments

from st_wkl.losses import WeightedKLDistillationLoss
from st_wkl.training.sharding import check_sharded
from tests.losses.students import make_student
from tests.processes import run_module


def trained(model: Path, output: Path, processes: int, way: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train in a fresh process, or two, and return the loss curve and the weights."""
    run_module("tests.training.train_torchrun", model, output, processes, way, processes=processes)
    assert not (output / "checkpoints").exists()
    assert (output / "distillation.json").is_file()
    curve = json.loads((output / "curve.json").read_text(encoding="utf-8"))
    return curve, load_file(output / "model.safetensors")


@pytest.mark.parametrize("ways", [("dense", "fsdp"), ("multi-vector",)])
def test_two_processes_give_the_loss_curve_of_one(ways: tuple[str, ...], tiny_bert_path: Path, tmp_path: Path) -> None:
    """A missing synchronisation still trains, only something else; so do shards that are put together wrongly."""
    one, first = trained(tiny_bert_path, tmp_path / "one", 1, ways[0])
    assert len(one) == 6
    assert len(set(one)) > 1
    for way in ways:
        two, second = trained(tiny_bert_path, tmp_path / way, 2, way)
        assert two == pytest.approx(one, abs=2e-4)  # the trainer rounds what it logs to four decimals
        assert first.keys() == second.keys()
        for name, value in first.items():
            torch.testing.assert_close(value, second[name], rtol=0, atol=1e-7, msg=name)


def test_an_iterable_dataset_trains_under_torchrun(tiny_bert_path: Path, tmp_path: Path) -> None:
    """By default accelerate cuts every tensor of a batch to its rows and fails on what is no tensor."""
    curve, _ = trained(tiny_bert_path, tmp_path / "student", 2, "iterable")
    assert len(curve) == 6
    assert all(value == value for value in curve)


def test_what_hangs_or_gets_lost_with_fsdp_is_refused(tiny_bert_path: Path, tmp_path: Path) -> None:
    """Processes that wait for each other say nothing, and a best checkpoint that is not loaded only a line."""
    student = make_student("dense", tiny_bert_path)
    args, best = (
        SentenceTransformerTrainingArguments(str(tmp_path), eval_strategy="steps", eval_steps=1, save_steps=1, **more)
        for more in ({}, {"load_best_model_at_end": True})
    )
    plain, cached = (WeightedKLDistillationLoss(student, mini_batch_size=size) for size in (None, 2))
    check_sharded(args, plain, resuming=False)
    for message, case in (
        ("wait for each other", (args, cached, False)),
        ("best checkpoint", (best, plain, False)),
        ("cannot go on", (args, plain, True)),
    ):
        with pytest.raises(ValueError, match=message):
            check_sharded(*case[:2], resuming=case[2])
