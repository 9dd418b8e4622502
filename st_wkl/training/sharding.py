"""Students whose weights are spread over processes (FSDP2): what cannot be done with them, and how they are saved."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from st_wkl.training.lora import save

if TYPE_CHECKING:
    import torch
    from sentence_transformers.base.trainer import BaseTrainer
    from sentence_transformers.base.training_args import BaseTrainingArguments
    from torch import nn

    from st_wkl.losses.scoring import Student


def check_sharded(args: BaseTrainingArguments, loss: nn.Module, *, resuming: bool) -> None:
    """Stop where training with FSDP would hang, or lose what it is asked to keep.

    Seen with sentence-transformers 6.2, transformers 5.23, accelerate 1.15 and torch 2.13.

    Args:
        args: The training arguments.
        loss: The loss.
        resuming: Whether there is a checkpoint to go on from.

    Raises:
        ValueError: If so.
    """
    if any(getattr(part, "mini_batch_size", None) is not None for part in loss.modules()):
        raise ValueError(
            "With FSDP every forward pass is one of all processes together, and their batches do not make the same "
            "number of mini-batches: they would wait for each other for ever. Give a loss without mini_batch_size, "
            "such as loss=lambda student: WeightedKLDistillationLoss(student), and smaller batches."
        )
    if args.load_best_model_at_end:
        raise ValueError(
            "With FSDP the trainer of sentence-transformers cannot load the best checkpoint; it goes on with the last "
            "one. Set eval_strategy and leave load_best_model_at_end=False, or leave `eval` away."
        )
    if resuming:
        raise ValueError(
            "The trainer of sentence-transformers cannot go on from a checkpoint that was written with FSDP. Delete "
            "the unfinished run, or give another folder, and train from the start."
        )


class WholeCopy:
    """A copy of a student that stays whole while the trainer shards the original, to be saved in its place.

    Sharded tensors have no storage that safetensors could write, and the trainer of sentence-transformers leaves the
    gathered weights aside that transformers hands to it. So the first process keeps a copy in memory.

    Args:
        trainer: A trainer that shards, before it trains.
        main: Whether this process writes.
    """

    def __init__(self, trainer: BaseTrainer, *, main: bool) -> None:
        self.trainer = trainer
        self.student: Any = copy.deepcopy(trainer.model).cpu() if main else None
        trainer._save = self._save  # type: ignore[method-assign]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save a checkpoint; transformers calls this in all processes, with the gathered weights."""
        if self.student is not None:
            self.student.load_state_dict(state_dict)
            save(self.student, output_dir or str(self.trainer.args.output_dir))

    def gathered(self, dtype: torch.dtype | None = None) -> Student | None:
        """Return the student with the trained weights in the process that writes; all processes have to ask.

        Args:
            dtype: Number type to round the weights to. Default: the one that they were trained in.
        """
        state = self.trainer.accelerator.get_state_dict(self.trainer.model)
        if self.student is not None:
            self.student.load_state_dict(state)
            self.student.to(dtype)
        return self.student
