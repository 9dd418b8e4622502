"""Several processes of one command, as `torchrun` starts them."""

from __future__ import annotations

import os
import sys


def launched() -> int:
    """Return how many processes run this command, 1 without `torchrun`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Return whether this process is the one that writes and answers."""
    return int(os.environ.get("RANK", "0")) == 0


def leave() -> None:
    """End the process group: exiting with gloo's threads alive aborts a process now and then."""
    torch = sys.modules.get("torch")  # a command that needs no torch has no group
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
