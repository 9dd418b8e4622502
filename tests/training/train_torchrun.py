"""Distil tiny students under torchrun, or in one process; run by test_torchrun.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from st_wkl.losses import WeightedKLDistillationLoss
from st_wkl.training import distill
from st_wkl.training.lora import default_targets
from st_wkl.training.students import kind_of
from tests.helpers.processes import COMPARABLE, leave
from tests.helpers.students import make_student, ragged_rows


class LossCurve(TrainerCallback):
    """Keeps what the trainer logs."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])


def shard_on_cpus() -> None:
    """Let accelerate shard on CPUs, too.

    It knows FSDP as something that devices do, and leaves it out elsewhere without a word. Torch and gloo can, so this
    sets on CPUs what `AcceleratorState` sets on devices.
    """
    original = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


def train(model_path: str, output: Path, processes: int, way: str) -> None:
    # Doubles, in which two ways of adding up the same numbers hardly differ.
    student = make_student("multi-vector" if way == "multi-vector" else "dense", Path(model_path)).double()
    rows: Any = Dataset.from_list(ragged_rows(24))
    if way == "iterable":
        # As many shards as processes: each reads its own.
        rows = rows.to_iterable_dataset(num_shards=2)
    sharding: dict[str, Any] = {}
    if way.startswith("fsdp") and processes > 1:
        sharding = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["BertLayer"]}}
    args = kind_of(student).arguments(
        output_dir="unused",
        per_device_train_batch_size=8 // processes,
        max_steps=6,
        learning_rate=0.02,
        logging_steps=1,
        save_steps=3,
        **COMPARABLE,
        **sharding,
    )
    curve = LossCurve()
    distill(
        student,
        rows,
        WeightedKLDistillationLoss,
        args,
        output_dir=output,
        callbacks=[curve],
        # Without dropout, which every process draws for itself.
        lora=way.endswith("lora") and LoraConfig(r=4, target_modules=default_targets(student)),
    )
    assert any(isinstance(value, DTensor) for value in student.parameters()) == bool(sharding)
    if args.process_index == 0:
        (output / "curve.json").write_text(json.dumps(curve.losses), encoding="utf-8")


def main(model_path: str, output: str, processes: str, *ways: str) -> None:
    torch.set_num_threads(1)
    shard_on_cpus()
    for way in ways:
        train(model_path, Path(output) / way, int(processes), way)
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
