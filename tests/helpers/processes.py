"""Training scripts in fresh processes: how they are started, what makes one and two of them equal, how they end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from st_wkl import _processes

ROOT = Path(__file__).resolve().parents[2]

# Arguments under which several processes add up the same numbers as one: Adam magnifies what rounding leaves.
COMPARABLE: dict[str, Any] = {
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
}


def run_module(module: str, *arguments: Any, processes: int, timeout: int = 400) -> str:
    """Run a module in a fresh process, or under torchrun in two, fail with what it says, and return its output."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--module"]
    done = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else ["-m"]), module, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def leave() -> None:
    """End a script, all its processes at once."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    _processes.leave()
