"""What watches a training: it stops before a spoilt student is saved, and says how far the student is."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from st_wkl.functional import contrastive_weights
from st_wkl.functional._checks import check, checked
from st_wkl.losses.base import CandidateListLoss
from st_wkl.losses.lists import CandidateLists
from st_wkl.losses.weighted_kl import WeightedKLDistillationLoss
from st_wkl.progress import progress

if TYPE_CHECKING:
    from sentence_transformers.base.trainer import BaseTrainer
    from sentence_transformers.base.training_args import BaseTrainingArguments
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)

# With fewer steps even a learning rate that fits changes little.
_FEW_STEPS = 10
AGREEMENT, MEAN_WEIGHT = "teacher_agreement", "mean_weight"
# Batches that a value in the log is averaged over, at most: scores are kept until then, and no step pays for the rest.
_WINDOW = 16


class FiniteWeightsCallback(TrainerCallback):
    """Stops training where weights that are about to be saved, or are the last, are not finite.

    Losses see the weights of the step before: what the last step does, nobody would notice.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the weights before a checkpoint and after the last step."""
        if control.should_save or control.should_training_stop or state.global_step >= state.max_steps:
            check_weights(kwargs["model"], args, state.global_step)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the weights before the checkpoint of an epoch."""
        if control.should_save:
            check_weights(kwargs["model"], args, state.global_step)


class ProgressLine(TrainerCallback):
    """Shows a training in one line with its loss, agreement and dev score, in place of the trainer's dictionaries."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin the line, where a resumed training goes on."""
        self._at, self._told = state.global_step, dict[str, str]()
        shown = {"total": state.max_steps, "initial": self._at, "unit": " steps"}
        self._line = progress(desc="Training", disable=not state.is_world_process_zero, **shown)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the step."""
        self._line.update(state.global_step - self._at)
        self._at = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Take what is told from the log."""
        names = {"loss": "loss", AGREEMENT: "agreement with the teacher", args.metric_for_best_model: "dev"}
        self._told |= {told: f"{logs[name]:.4g}" for name, told in names.items() if name in (logs or ())}
        self._line.set_postfix_str(", ".join(f"{told} {value}" for told, value in self._told.items()))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the line."""
        self._line.close()


def check_weights(model: nn.Module, args: TrainingArguments, step: int) -> None:
    """Stop where a weight is not finite, and say what is known to do this."""
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
    """Stop where a loss is not finite; a trainer logs it as 0. A forward hook."""

    def diverged(name: str, value: Tensor, count: int) -> None:
        raise ValueError(
            f"{type(loss).__name__}: {name} of this batch is {value.detach().float().mean().item()}, and one step with "
            "it makes every weight NaN. The student has diverged (start again with a smaller learning rate), or the "
            "teacher's scores, divided by its temperature, are larger than numbers can hold."
        )

    def look() -> Any:
        for name, value in output.items() if isinstance(output, dict) else [("the loss", output)]:
            if isinstance(value, Tensor):
                check(~torch.isfinite(value), partial(diverged, name, value))
        return output

    checked(look)


def say_few_steps(args: BaseTrainingArguments, count: int | None) -> None:
    """Say so where there is a handful of steps, or one with a learning rate of 0."""
    steps = args.max_steps
    if steps <= 0 and count is not None:
        batches = -(-count // max(args.train_batch_size * args.world_size, 1))
        steps = int(-(-batches // max(args.gradient_accumulation_steps, 1)) * max(args.num_train_epochs, 0))
        if 0 < steps < _FEW_STEPS:
            logger.warning(
                "%d rows make %d steps of training, in which a student hardly moves. More epochs or smaller batches "
                "make more: default_arguments(student, output_dir, num_train_epochs=…, per_device_train_batch_size=…).",
                count,
                steps,
            )
    if steps == 1 and args.get_warmup_steps(steps) and args.lr_scheduler_type != "constant":
        logger.warning(
            "Training is one step, and that one is warm-up (warmup_steps=%g): its learning rate is 0, so the student "
            "will not change. Train longer, or set warmup_steps=0.",
            args.warmup_steps,
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


class TeacherAgreementCallback(TrainerCallback):
    """Adds `teacher_agreement` and, for weighted KL, `mean_weight` to every training log line.

    - `teacher_agreement`: the share of document pairs of a list that the student orders as the teacher does, averaged
      over lists; pairs that either of them scores alike count one half. 0.5 is a coin, 1 the teacher. Unlike the loss
      it compares across losses and temperatures.
    - `mean_weight`: the mean of the weights of `st_wkl.functional.weighted_kl` over documents. It falls as the student
      learns; near 0 there is nothing left that the loss wants to change.

    Both are over the last 16 batches before the log line, of the main process. Values that were put into the line reach
    whatever `report_to` names, and the trainer's history.

    Args:
        loss: The loss that is trained; every list loss in it is watched, the first of them is what is logged.
        name: The dataset that has this loss, where several have their own: the values are called
            `teacher_agreement_<name>` then.
    """

    def __init__(self, loss: nn.Module, name: str = "") -> None:
        self.suffix = f"_{name}" if name else ""
        self.seen: deque[tuple[Tensor, CandidateLists]] = deque(maxlen=_WINDOW)
        self.loss = next((part for part in loss.modules() if isinstance(part, CandidateListLoss)), None)
        if self.loss is not None:
            self.loss.observer = lambda scores, lists: self.seen.append((scores, lists))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the values to a line that reports a training loss."""
        if not logs or "loss" not in logs or not self.seen:
            return
        values = self.values()
        self.seen.clear()
        logs.update(values)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(values)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop watching."""
        if self.loss is not None:
            self.loss.observer = None

    def values(self) -> dict[str, float]:
        """Return what the log line is told of the batches that were seen."""
        scores, lists = _joined(self.seen)
        values = {AGREEMENT: float(agreement(scores, lists.scores, lists.mask).double().mean())}
        if isinstance(loss := self.loss, WeightedKLDistillationLoss):
            weights = contrastive_weights(
                scores,
                (lists.gains >= loss.positive_threshold) & lists.mask,
                gamma=loss.gamma,
                alpha=loss.alpha,
                beta=loss.beta,
                ranks=lists.ranks if loss.ranks == "dataset" else None,
                mask=lists.mask,
                student_temperature=loss.student_temperature,
                several_positives=loss.several_positives,
            )
            values[MEAN_WEIGHT] = float(weights[lists.mask].double().mean())
        return {f"{name}{self.suffix}": round(value, 4) for name, value in values.items() if value == value}


def watch(trainer: BaseTrainer, loss: nn.Module, name: str = "") -> None:
    """Let a trainer log agreement and weights: before its reporters, which are called in the order of their adding."""
    trainer.callback_handler.callbacks.insert(0, TeacherAgreementCallback(loss, name))


def _joined(seen: Iterable[tuple[Tensor, CandidateLists]]) -> tuple[Tensor, CandidateLists]:
    """Return all batches as one, in which lists are as long as the longest: one computation instead of many."""
    batches, lists = zip(*seen, strict=True)
    width = max(scores.shape[1] for scores in batches)

    def join(parts: Iterable[Tensor | None]) -> Tensor:
        return torch.cat([nn.functional.pad(part, (0, width - part.shape[1])) for part in parts if part is not None])

    fields = {name: join(getattr(part, name) for part in lists) for name in ("scores", "gains", "index", "mask")}
    ranks = None if lists[0].ranks is None else join(part.ranks for part in lists)
    return join(batches), CandidateLists(**fields, identity=None, ranks=ranks)


def agreement(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Return the share of pairs that student and teacher order alike, of each `(B, N)` list that has a pair."""
    pairs = (mask[:, :, None] & mask[:, None, :]).triu(diagonal=1)
    scores = (torch.where(mask, side.float(), 0.0) for side in (student, teacher))
    signs = [torch.sign(side[:, :, None] - side[:, None, :]) for side in scores]
    agreed = torch.where(pairs, (signs[0] * signs[1] + 1) / 2, 0.0).sum(dim=(1, 2))
    counts = pairs.sum(dim=(1, 2))
    return (agreed / counts.clamp_min(1))[counts > 0]
