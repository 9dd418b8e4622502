"""distill() under torchrun: two gloo processes train what one trains, and only one of them writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformerTrainingArguments

from st_wkl.losses import WeightedKLDistillationLoss
from st_wkl.training.checkpoints import check_sharded
from tests.helpers.processes import run_module
from tests.helpers.students import make_student

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("torchrun")]


@pytest.fixture(scope="module")
def folder(tiny_bert_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All ways of training, one after another in a process and in two, as starting one takes longer than training."""
    output = tmp_path_factory.mktemp("torchrun")
    script = "tests.training.train_torchrun"
    run_module(script, tiny_bert_path, output / "one", 1, "dense", "multi-vector", "lora", processes=1)
    # Sharding last: accelerate keeps to it in the process.
    ways = ("dense", "multi-vector", "iterable", "fsdp", "fsdp-lora")
    run_module(script, tiny_bert_path, output / "two", 2, *ways, processes=2)
    return output


def trained(output: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Return the loss curve and the weights, of an adapter its own."""
    assert not (output / "checkpoints").exists()
    assert (output / "distillation.json").is_file()
    curve = json.loads((output / "curve.json").read_text(encoding="utf-8"))
    (weights,) = output.glob("*model.safetensors")
    return curve, load_file(weights)


@pytest.mark.parametrize(
    ("way", "expected"),
    [("dense", "dense"), ("multi-vector", "multi-vector"), ("fsdp", "dense"), ("fsdp-lora", "lora")],
)
def test_two_processes_give_the_loss_curve_of_one(way: str, expected: str, folder: Path) -> None:
    """A missing synchronisation still trains, only something else; so do shards that are put together wrongly."""
    one, first = trained(folder / "one" / expected)
    two, second = trained(folder / "two" / way)
    assert len(one) == 6
    assert len(set(one)) > 1
    assert two == pytest.approx(one, abs=2e-4)  # the trainer rounds what it logs to four decimals
    assert first.keys() == second.keys()
    assert any("lora_B" in name for name in first) == ("lora" in way)
    for name, value in first.items():
        assert value.any() or "lora_B" not in name, "zero, as before training"
        torch.testing.assert_close(value, second[name], rtol=0, atol=1e-7, msg=name)


def test_an_iterable_dataset_trains_under_torchrun(folder: Path) -> None:
    """By default accelerate cuts every tensor of a batch to its rows and fails on what is no tensor."""
    curve, _ = trained(folder / "two" / "iterable")
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
