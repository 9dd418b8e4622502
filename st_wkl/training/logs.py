"""What training says about itself: how far the student agrees with the teacher, and what the weights leave to learn."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from st_wkl.functional import contrastive_weights
from st_wkl.losses.base import CandidateListLoss
from st_wkl.losses.lists import CandidateLists
from st_wkl.losses.weighted_kl import WeightedKLDistillationLoss

if TYPE_CHECKING:
    from sentence_transformers.base.trainer import BaseTrainer
    from transformers import TrainerControl, TrainerState, TrainingArguments

AGREEMENT, MEAN_WEIGHT = "teacher_agreement", "mean_weight"
# Batches that a value in the log is averaged over, at most: scores are kept until then, and no step pays for the rest.
_WINDOW = 16


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

    Example:
        >>> watch(trainer, loss)  # adds the callback where the reporters still hear it  # doctest: +SKIP
    """

    def __init__(self, loss: nn.Module) -> None:
        self.seen: deque[tuple[Tensor, CandidateLists]] = deque(maxlen=_WINDOW)
        found = [part for part in loss.modules() if isinstance(part, CandidateListLoss)]
        self.loss = found[0] if found else None
        if self.loss is not None:
            self.loss.observer = self._note

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the values to a line that reports a training loss."""
        if not logs or "loss" not in logs or not self.seen:
            return
        values = self._values()
        self.seen.clear()
        logs.update(values)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(values)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop watching."""
        if self.loss is not None:
            self.loss.observer = None

    def _note(self, scores: Tensor, lists: CandidateLists) -> None:
        self.seen.append((scores, lists))

    def _values(self) -> dict[str, float]:
        scores, lists = _joined(self.seen)
        values = {AGREEMENT: float(_agreement(scores, lists.scores, lists.mask).double().mean())}
        if isinstance(self.loss, WeightedKLDistillationLoss):
            values[MEAN_WEIGHT] = float(_weights(self.loss, scores, lists).double().mean())
        return {name: round(value, 4) for name, value in values.items() if value == value}


def watch(trainer: BaseTrainer, loss: nn.Module) -> None:
    """Let a trainer log agreement and weights.

    Reporters are called in the order in which they were added, so this has to stand before them.
    """
    trainer.callback_handler.callbacks.insert(0, TeacherAgreementCallback(loss))


def _joined(seen: Iterable[tuple[Tensor, CandidateLists]]) -> tuple[Tensor, CandidateLists]:
    """Return all batches as one, in which lists are as long as the longest: one computation instead of many."""
    batches, lists = zip(*seen, strict=True)
    width = max(scores.shape[1] for scores in batches)

    def join(parts: Iterable[Tensor | None]) -> Tensor:
        return torch.cat([nn.functional.pad(part, (0, width - part.shape[1])) for part in parts if part is not None])

    fields = {name: join(getattr(part, name) for part in lists) for name in ("scores", "gains", "index", "mask")}
    ranks = None if lists[0].ranks is None else join(part.ranks for part in lists)
    return join(batches), CandidateLists(**fields, identity=None, ranks=ranks)


def _agreement(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Return the agreement of each list with a pair."""
    pairs = (mask[:, :, None] & mask[:, None, :]).triu(diagonal=1)
    teacher = torch.where(mask, teacher.float(), 0.0)
    student = torch.where(mask, student.float(), 0.0)
    signs = [torch.sign(scores[:, :, None] - scores[:, None, :]) for scores in (student, teacher)]
    agreed = torch.where(pairs, (signs[0] * signs[1] + 1) / 2, 0.0).sum(dim=(1, 2))
    counts = pairs.sum(dim=(1, 2))
    return (agreed / counts.clamp_min(1))[counts > 0]


def _weights(loss: WeightedKLDistillationLoss, scores: Tensor, lists: CandidateLists) -> Tensor:
    weights = contrastive_weights(
        scores,
        (lists.gains >= loss.positive_threshold) & lists.mask,
        gamma=loss.gamma,
        alpha=loss.alpha,
        beta=loss.beta,
        ranks=getattr(lists, "ranks", None) if getattr(loss, "ranks", "student") == "dataset" else None,
        mask=lists.mask,
        student_temperature=loss.student_temperature,
        several_positives=loss.several_positives,
    )
    return weights[lists.mask]
