"""The student's own moving average as a second teacher."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder
from sentence_transformers.util import truncate_embeddings
from torch import Tensor, nn
from transformers import TrainerCallback

from st_wkl.files import replacing
from st_wkl.losses.base import CandidateListLoss
from st_wkl.losses.lists import SCORE, holds_lists
from st_wkl.losses.scoring import embed, score_lists
from st_wkl.training.checkpoints import checkpoint_folder

if TYPE_CHECKING:
    from st_wkl.losses.scoring import Student

_WEIGHTS_FILE = "moving_average.safetensors"


class MovingAverageCallback(TrainerCallback):
    """Keeps an exponential moving average of the student's weights, in `model`.

    The average is steadier than any of its parts: a student worth saving, and a second teacher for `MovingAverageLoss`.
    Checkpoints hold it, so a resumed run goes on as if it had not been stopped.

    Args:
        model: The student before training.
        decay: Weight of the average at each step, against that of the new weights. Early on it is less, at most
            (1 + step) / (10 + step), so that the average forgets the untrained student.

    Raises:
        ValueError: If the decay is not within [0, 1).

    Example:
        >>> average = MovingAverageCallback(student, decay=0.99)  # doctest: +SKIP
        >>> trainer = SentenceTransformerTrainer(student, args, data, loss=loss, callbacks=[average])  # doctest: +SKIP
        >>> average.model.save_pretrained("steadier-student")  # after training  # doctest: +SKIP
    """

    def __init__(self, model: Student, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be within [0, 1), got {decay}.")
        self.decay = decay
        # In float32 whatever the student is: a thousandth of a difference is rounded away in half precision.
        self.model = copy.deepcopy(model).eval().requires_grad_(False).float()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the average of a checkpoint where training is resumed."""
        if state.global_step:
            path = checkpoint_folder(args, state, resumed=True) / _WEIGHTS_FILE
            if not path.is_file():
                raise FileNotFoundError(
                    f"{path} does not exist, so the average is not known. Resume from a checkpoint "
                    "that was saved with this callback, in the output_dir of the training arguments."
                )
            self.model.load_state_dict(load_file(path))
        self.model.to(kwargs["model"].device)

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the average towards the student."""
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        new = kwargs["model"].state_dict()
        for name, value in self.model.state_dict().items():
            if value.is_floating_point():
                value.lerp_(new[name].to(value), 1 - decay)
            else:
                value.copy_(new[name])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the average beside the weights."""
        if state.is_world_process_zero:
            # Cloned: tied weights share memory, which the format refuses.
            tensors = {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}
            with replacing(checkpoint_folder(args, state) / _WEIGHTS_FILE) as temporary:
                save_file(tensors, temporary)


class MovingAverageLoss(nn.Module):
    """A loss over candidate lists whose teacher is a mixture of the given one and the student's moving average.

    With t the teacher's and a the average's scores, the loss sees (1 − w)·t/τ_t + w·a/τ_s: the geometric mean of the
    two softmaxes. The average knows the other queries, the teacher this one; where they differ, the target moves less
    far than the teacher asks for. In evaluation the teacher is alone, so that losses compare.

    Args:
        loss: Any loss over candidate lists, such as `WeightedKLDistillationLoss`, of an embedding model.
        average: The callback that keeps the average; give it to the trainer as well.
        weight: Share w of the average, within [0, 1].

    Raises:
        TypeError: If the loss is none over candidate lists, or its student is a cross-encoder.
        ValueError: If the weight is not within [0, 1].

    Source:
        Mean teacher, Tarvainen and Valpola, NeurIPS 2017, https://arxiv.org/abs/1703.01780, whose average is here
        mixed into the target in place of a loss of its own.

    Example:
        >>> average = MovingAverageCallback(student)  # doctest: +SKIP
        >>> loss = MovingAverageLoss(WeightedKLDistillationLoss(student), average, weight=0.3)  # doctest: +SKIP
    """

    def __init__(self, loss: CandidateListLoss, average: MovingAverageCallback, weight: float = 0.5) -> None:
        super().__init__()
        if not isinstance(loss, CandidateListLoss) or isinstance(average.model, CrossEncoder):
            raise TypeError(
                "MovingAverageLoss takes a loss over candidate lists of an embedding model, got "
                f"{type(loss).__name__} of a {type(average.model).__name__}."
            )
        if not 0 <= weight <= 1:
            raise ValueError(f"weight must be within [0, 1], got {weight}.")
        self.loss, self.average, self.weight = loss, average, weight

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """Mix the average's scores into the teacher's, and compute the loss."""
        columns = list(sentence_features)
        if self.loss.model.training and self.weight:
            labels = self._mixed(columns, labels)
        return self.loss(columns, labels)

    @torch.no_grad()
    def _mixed(self, columns: list[dict[str, Any]], labels: Tensor | None) -> Tensor:
        loss = self.loss
        # Copies, since some modules write into their features.
        embeddings = [
            truncate_embeddings(embed(self.average.model, dict(features), loss.output), loss.truncate_dim)
            for features in columns
        ]
        lists = loss._lists(embeddings, labels)
        own = score_lists(embeddings, lists, loss.similarity_fct) / loss.student_temperature
        scores = (1 - self.weight) * lists.scores + self.weight * loss.teacher_temperature * own.to(lists.scores)
        if not holds_lists(labels):
            return scores
        assert labels is not None
        mixed = labels.clone()
        mixed[..., SCORE] = scores
        return mixed

    def get_config_dict(self) -> dict[str, Any]:
        """Return the parameters for the model card."""
        average = {"moving_average_weight": self.weight, "moving_average_decay": self.average.decay}
        return {"loss": type(self.loss).__name__, **self.loss.get_config_dict(), **average}

    @property
    def citation(self) -> str:
        """BibTeX of the loss, for the model card."""
        return str(getattr(self.loss, "citation", ""))
