"""The training itself: from a trainer that is ready to a student that is fit to be saved, and the log of it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sentence_transformers.util import get_rank

from st_wkl.models import hash_weights
from st_wkl.training import dev
from st_wkl.training.checkpoints import DurableCheckpoints
from st_wkl.training.guard import FiniteWeightsCallback, check_loss_values, check_weights, say_unchanged
from st_wkl.training.logs import watch
from st_wkl.training.sharding import WholeCopy

if TYPE_CHECKING:
    import torch
    from sentence_transformers.base.evaluation import BaseEvaluator
    from sentence_transformers.base.trainer import BaseTrainer
    from torch import nn

    from st_wkl.training.checkpoints import Checkpoint

logger = logging.getLogger(__name__)


def fit(
    trainer: BaseTrainer,
    loss: nn.Module,
    evaluator: BaseEvaluator | None,
    checkpoint: Checkpoint | None,
    rounded: torch.dtype | None,
) -> tuple[Any, list[dict[str, Any]], dict[str, float]]:
    """Train, or do what is left of it, and look at what comes of it.

    Args:
        trainer: A trainer that has been checked.
        loss: Its loss.
        evaluator: What measures the student before and after.
        checkpoint: Where to go on; None begins.
        rounded: Number type in which the student is going to be saved; None leaves it.

    Returns:
        The student, whole on the first process; the trainer's log; scores `before` and `after`, if any.

    Raises:
        ValueError: If a loss or a weight is not finite.
    """
    student: Any = trainer.model
    args = trainer.args
    whole = WholeCopy(trainer, main=get_rank() == 0) if trainer.is_fsdp_enabled else None
    watch(trainer, loss)
    trainer.add_callback(FiniteWeightsCallback())
    trainer.add_callback(DurableCheckpoints())
    watched = loss.register_forward_hook(check_loss_values)
    before = None if whole is not None else hash_weights(student)
    scores = {} if evaluator is None else {"before": dev.score(evaluator, student)}
    try:
        history = _train(trainer, checkpoint)
    finally:
        watched.remove()
    if before is not None and before == hash_weights(student):
        say_unchanged(args, trainer.state.global_step)
    if rounded is not None and whole is None:
        student.to(rounded)  # what is measured is what is saved
        check_weights(student, args, trainer.state.global_step)
    if evaluator is not None:
        scores["after"] = dev.score(evaluator, student)
    return (student if whole is None else whole.gathered(rounded) or student), history, scores


def _train(trainer: BaseTrainer, checkpoint: Checkpoint | None) -> list[dict[str, Any]]:
    """Train, or do what is left of it, and return the log."""
    if checkpoint is None:
        trainer.train()
    elif checkpoint.finished:
        # The trainer would take one more step after the last one, so only the weights are taken.
        best = checkpoint.state.get("best_model_checkpoint") if trainer.args.load_best_model_at_end else None
        source = checkpoint.folder if best is None else checkpoint.folder.with_name(Path(best).name)
        logger.info("Training was complete at step %d.", checkpoint.state["global_step"])
        trainer._load_from_checkpoint(str(source))
        return list(checkpoint.state["log_history"])
    else:
        logger.info("Going on at step %d of %d.", checkpoint.state["global_step"], checkpoint.state["max_steps"])
        trainer.train(resume_from_checkpoint=str(checkpoint.folder))
    return list(trainer.state.log_history)
