"""Stops a training that has gone wrong before its student is saved, and says so where one has done nothing."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from st_wkl.functional._checks import check, checked

if TYPE_CHECKING:
    from sentence_transformers.base.training_args import BaseTrainingArguments
    from transformers import TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

# With fewer steps even a learning rate that fits changes little.
_FEW_STEPS = 10


class FiniteWeightsCallback(TrainerCallback):
    """Stops training where weights that are about to be saved, or are the last, are not finite.

    Losses see the weights of the step before: what the last step does, nobody would notice.
    """

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look at the weights before a checkpoint and after the last step."""
        if control.should_save or control.should_training_stop or state.global_step >= state.max_steps:
            check_weights(kwargs["model"], args, state.global_step)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the weights before the checkpoint of an epoch."""
        if control.should_save:
            check_weights(kwargs["model"], args, state.global_step)


def check_weights(model: nn.Module, args: TrainingArguments, step: int) -> None:
    """Stop where a weight is not finite.

    Raises:
        ValueError: With the weight and what is known to do this.
    """
    for name, weight in model.named_parameters():
        values: Any = weight.to_local() if hasattr(weight, "to_local") else weight
        if bool(torch.isfinite(values).all()):
            continue
        share = float((~torch.isfinite(values)).float().mean())
        raise ValueError(
            f"After step {step}, {share:.0%} of the weight {name!r} is NaN or infinite, so the student is worth "
            f"nothing and is not saved. Start again with a smaller learning rate (learning_rate={args.learning_rate}, "
            f"max_grad_norm={args.max_grad_norm}), in bf16 or fp32 if this was fp16; and look for teacher's scores "
            "that are far from all others."
        )


def check_loss_values(loss: nn.Module, inputs: Any, output: Any) -> None:
    """Stop where a loss is not finite; a trainer logs it as 0. A forward hook.

    Raises:
        ValueError: With the value.
    """

    def look(name: str, value: Tensor) -> None:
        def found(count: int) -> None:
            raise ValueError(
                f"{type(loss).__name__}: {name} of this batch is {value.detach().float().mean().item()}, and one step "
                "with it makes every weight NaN. The student has diverged (start again with a smaller learning rate), "
                "or the teacher's scores, divided by its temperature, are larger than numbers can hold."
            )

        check(~torch.isfinite(value), found)

    def look_at_all() -> Any:
        for name, value in output.items() if isinstance(output, dict) else [("the loss", output)]:
            if isinstance(value, Tensor):
                look(name, value)
        return output

    checked(look_at_all)


def say_few_steps(args: BaseTrainingArguments, count: int | None) -> None:
    """Say so where the rows make a handful of steps."""
    if count is None or args.max_steps > 0:
        return
    batches = -(-count // max(args.train_batch_size * args.world_size, 1))
    steps = int(-(-batches // max(args.gradient_accumulation_steps, 1)) * max(args.num_train_epochs, 0))
    if 0 < steps < _FEW_STEPS:
        logger.warning(
            "%d rows make %d steps of training, in which a student hardly moves. More epochs or smaller batches make "
            "more: default_arguments(student, output_dir, num_train_epochs=…, per_device_train_batch_size=…).",
            count,
            steps,
        )


def say_unchanged(args: BaseTrainingArguments, steps: int) -> None:
    """Say that training has changed no weight, and what may be why."""
    logger.warning(
        "Training changed no weight of the student: %d steps, learning_rate=%s, num_train_epochs=%s, max_grad_norm=%s. "
        "The student that is saved is the one that was given.",
        steps,
        args.learning_rate,
        args.num_train_epochs,
        args.max_grad_norm,
    )
