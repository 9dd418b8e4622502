"""distill() under torchrun: two gloo processes train what one trains, and only one of them writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--module"]


def trained(model: Path, output: Path, processes: int, way: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train in a fresh process, or two, and return the loss curve and the weights."""
    done = subprocess.run(
        [
            sys.executable,
            *(LAUNCHER if processes > 1 else ["-m"]),
            "tests.training.train_torchrun",
            *(str(value) for value in (model, output, processes, way)),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert not (output / "checkpoints").exists()
    assert (output / "distillation.json").is_file()
    curve = json.loads((output / "curve.json").read_text(encoding="utf-8"))
    return curve, load_file(output / "model.safetensors")


@pytest.mark.parametrize("way", ["dense", "multi-vector"])
def test_two_processes_give_the_loss_curve_of_one(way: str, tiny_bert_path: Path, tmp_path: Path) -> None:
    """A missing synchronisation still trains, only something else."""
    one, first = trained(tiny_bert_path, tmp_path / "one", 1, way)
    two, second = trained(tiny_bert_path, tmp_path / "two", 2, way)
    assert len(one) == 6
    assert len(set(one)) > 1
    assert two == pytest.approx(one, abs=2e-4)  # the trainer rounds what it logs to four decimals
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=1e-7, msg=name)


def test_an_iterable_dataset_trains_under_torchrun(tiny_bert_path: Path, tmp_path: Path) -> None:
    """By default accelerate cuts every tensor of a batch to its rows and fails on what is no tensor."""
    curve, _ = trained(tiny_bert_path, tmp_path / "student", 2, "iterable")
    assert len(curve) == 6
    assert all(value == value for value in curve)
