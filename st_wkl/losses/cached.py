"""A loss that embeds its own batch: in one forward pass, or in bounded memory through a gradient cache."""

from __future__ import annotations

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from sentence_transformers.base.losses import CachedLossMixin, RandContext, has_static_embedding_input
from sentence_transformers.base.losses.merged_forward import merge_feature_batches
from sentence_transformers.sparse_encoder.modules import SpladePooling
from sentence_transformers.util import batch_to_device, truncate_embeddings
from torch import Tensor, nn

from st_wkl._compat import create_minibatch, wrapper_at_work
from st_wkl.functional._checks import checked, watch_gradient
from st_wkl.losses.options import check_values, options_of, spelled_out
from st_wkl.losses.scoring import concatenate, embed, pair_features, student_output

if TYPE_CHECKING:
    from st_wkl.losses.scoring import Student

logger = logging.getLogger(__name__)

# What a wrapper adds to the whole: a term of its own, since no term can be told to be it.
WRAPPER = "wrapper"


class Terms(dict[str, Tensor]):
    """Named terms of a loss that can be weighted and summed like the tensor that their sum is.

    A trainer logs the terms of a loss that returns a dict, but wrappers such as `MatryoshkaLoss` and
    `AdaptiveLayerLoss` calculate with whatever they wrap, which a plain dict cannot.
    """

    def __mul__(self, weight: float | Tensor) -> Terms:
        return Terms({name: value * weight for name, value in self.items()})

    __rmul__ = __mul__

    def __truediv__(self, number: float | Tensor) -> Terms:
        return Terms({name: value / number for name, value in self.items()})

    def __add__(self, other: Any) -> Terms:
        if not isinstance(other, dict):
            if not isinstance(other, Tensor):
                if other == 0:  # what sums begin with
                    return Terms(self)
                other = torch.full_like(next(iter(self.values())), other)
            other = {WRAPPER: other}
        return Terms({**self, **other, **{name: self[name] + other[name] for name in self.keys() & other.keys()}})

    __radd__ = __add__

    def total(self) -> Tensor:
        """Return the sum of the terms, a scalar."""
        return torch.stack([value.reshape(()) for value in self.values()]).sum()

    def detach(self) -> Terms:
        """Return the terms without their gradients."""
        return Terms({name: value.detach() for name, value in self.items()})


@dataclass(frozen=True)
class _CachedBatch:
    """What `calculate_loss` needs beside the embeddings; rides through the gradient cache in place of the labels."""

    labels: Tensor | None
    inverses: list[Tensor | None]
    merged: int


@spelled_out
class StudentLoss(CachedLossMixin, nn.Module, ABC):
    """Base of all losses here: it turns a batch into embeddings, a subclass turns embeddings into a loss.

    All candidate columns go through the model in one forward pass. With `mini_batch_size`, rows are sorted by length
    and embedded in mini-batches twice, first without and then with gradients (GradCache,
    https://arxiv.org/abs/2101.06983), so that memory depends on the mini-batch and not on the batch. The gradient is
    the same. Sorting saves what upstream's cached losses spend on padding, because a mini-batch of short documents is
    only as wide as they are.

    Args:
        model: The student.
        mini_batch_size: Rows that are embedded at once; bounds memory at the price of a second forward pass. Default:
            the whole batch.
    """

    model: Student
    _: KW_ONLY
    mini_batch_size: int | None = None  # type: ignore[assignment]

    # Options that a card always tells, the key of the paper in citations.bib, and names of the release before.
    shown: ClassVar[tuple[str, ...]] = ()
    paper: ClassVar[str] = ""
    renamed: ClassVar[dict[str, str]] = {}

    def __post_init__(self) -> None:
        check_values(self)
        if self.mini_batch_size is not None and has_static_embedding_input(self.model):
            raise ValueError(
                "mini_batch_size has no use for a static embedding model: it keeps no activations, and its batches "
                "cannot be sliced. Leave mini_batch_size away; the whole batch fits."
            )
        self.uses_gradient_cache = self.mini_batch_size is not None
        # Decided now, because the trainer replaces `self.model` by a wrapper of another class.
        self.output = student_output(self.model)
        if self.output == "score" and self.model.num_labels != 1:
            raise ValueError(
                f"{type(self).__name__} ranks by one score, and this CrossEncoder has {self.model.num_labels} labels: "
                "load it with num_labels=1."
            )
        # What the student is used with is what it learns from.
        self.truncate_dim = getattr(self.model, "truncate_dim", None) if self.output == "embedding" else None
        self.batches_without_gradient = 0
        self._logged: list[tuple[int, Terms]] = []

    @abstractmethod
    def loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None) -> Any:
        """Compute the loss from one tensor per column, the queries' first: a scalar, or `Terms`."""

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None) -> Any:
        """Compute the loss of a batch that was embedded elsewhere, as `SpladeLoss` and other wrappers do.

        Args:
            embeddings: One tensor per column, the query first: query, positive, negative_1, …, or query and all
                documents of the lists. For a cross-encoder, the scores of all pairs alone.
            labels: As `forward` takes them.

        Returns:
            The loss, a scalar, or a scalar per named term.

        Raises:
            ValueError: As `forward` does, and if the loss has a gradient cache, which could not act.
        """
        if self.mini_batch_size is not None:
            name = type(self).__name__
            raise ValueError(
                f"{name}(mini_batch_size={self.mini_batch_size}) does not embed this batch: what is around it does "
                f"(SpladeLoss, CSRLoss, …), all at once, so mini_batch_size would do nothing. Make {name} without it; "
                f"for sparse students, CachedSpladeLoss(…, mini_batch_size={self.mini_batch_size}) has a cache itself."
            )
        return checked(lambda: self._watched(embeddings, labels))

    def _watched(self, embeddings: list[Tensor], labels: Tensor | None) -> Any:
        """Compute the loss, and notice where it has nothing to teach."""
        return self.loss_from_embeddings(watch_gradient(embeddings, self._say_no_gradient), labels)

    def _say_no_gradient(self) -> None:
        if not self.batches_without_gradient:
            logger.warning(
                "%s gives the embeddings of this batch no gradient, so the student learns nothing from it: no list has "
                "anything left to compare (labels of -inf, no positive, no negative, equal scores), or every weight "
                "and probability that is wrong has become 0, which a larger student_temperature or, in weighted KL, a "
                "smaller gamma changes. batches_without_gradient goes on counting.",
                type(self).__name__,
            )
        self.batches_without_gradient += 1

    def get_config_dict(self) -> dict[str, Any]:
        """Return the parameters for the model card: what `shown` names, and all that differs from its default."""
        cut = {} if self.truncate_dim is None else {"truncate_dim": self.truncate_dim}
        return {**options_of(self, self.shown), **cut}

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.get_config_dict().items())
        return f"{type(self).__name__}({options})"

    @property
    def citation(self) -> str:
        """BibTeX of the paper, for the model card."""
        return cited(self.paper)

    def forward(
        self,
        sentence_features: Iterable[Any],
        labels: Tensor | list[Tensor] | None = None,
        prompt: str | None = None,
        task: str | None = None,
    ) -> Any:
        """Embed a batch and compute the loss.

        Args:
            sentence_features: Tokenized columns: query, positive, negative_1, …, or query and documents as
                `ListwiseCollator` makes them. For a cross-encoder, columns of texts, or queries and lists of texts.
            labels: `(B, N)` teacher scores of the candidate columns, or what `ListwiseCollator` made.
            prompt: Prompt for the pairs of a cross-encoder; its trainer passes it.
            task: Task for the pairs of a cross-encoder; its trainer passes it.

        Returns:
            The loss, a scalar, or a scalar per named term.

        Raises:
            ValueError: If labels are missing, of another shape, or not finite.
        """
        self._check_wrapper()
        return checked(lambda: self._forward(list(sentence_features), labels, prompt, task))

    def _forward(
        self, columns: list[Any], labels: Tensor | list[Tensor] | None, prompt: str | None, task: str | None
    ) -> Any:
        if isinstance(labels, list):  # what the collator of cross-encoders makes of a column of lists
            if len({len(row) for row in labels}) > 1 or len(columns) == 2:
                raise ValueError(
                    "Lists of documents need data_collator=ListwiseCollator(model) in the trainer, which also says "
                    "which of the documents are relevant; the default collator only serves columns: query, positive, "
                    "negative_1, …"
                )
            labels = torch.stack(labels).to(self.model.device)
        if self.output == "score":
            features = pair_features(self.model, columns, prompt, task)  # type: ignore[arg-type]
            columns = [batch_to_device(features, self.model.device)]
        columns, merged = _merge_candidates(columns)
        if self.mini_batch_size is None:
            embeddings = [self._embed(features) for features in columns]
            return self._watched(_split_candidates(embeddings, merged), labels)
        pairs = [_sorted_by_length(features) for features in columns]
        batch = _CachedBatch(labels, [inverse for _, inverse in pairs], merged)
        self._logged.clear()
        loss = self.forward_cached([features for features, _ in pairs], batch)  # type: ignore[arg-type]
        return self._with_terms(loss) if self._logged else loss

    def _check_wrapper(self) -> None:
        """Stop inside of a wrapper that cannot be right around this loss."""
        name, wrapper = type(self).__name__, wrapper_at_work(self.model)
        if wrapper is None and self.output != "embedding" and hasattr(self.calculate_loss, "matryoshka_dims"):
            wrapper = "MatryoshkaLoss"
        if wrapper is not None and self.output != "embedding":
            raise ValueError(
                f"{wrapper} works on one embedding per text, which this student does not have: train it with {name} "
                "alone."
            )
        if wrapper != "AdaptiveLayerLoss":
            return
        if any(isinstance(part, SpladePooling) for part in self.model.modules()):
            raise ValueError(
                "AdaptiveLayerLoss cannot stand around a loss of a SPLADE student: only its last layer weighs words, "
                f"and the others would be trained as if they did. Train it with {name} inside SpladeLoss."
            )
        if self.mini_batch_size is not None:
            raise ValueError(
                f"{name}(mini_batch_size={self.mini_batch_size}) cannot stand inside AdaptiveLayerLoss or "
                "Matryoshka2dLoss: they hand the layers of one forward pass to the next, and a gradient cache makes "
                "passes of its own. Make it without mini_batch_size, with smaller batches."
            )

    def calculate_loss(self, reps: list[list[Tensor]], labels: Any = None, *, with_backward: bool = False) -> Tensor:
        """Compute the loss from the mini-batches' embeddings; called by the gradient cache, wrapped by Matryoshka."""
        batch: _CachedBatch = labels
        embeddings = [
            concatenate(chunks) if inverse is None else concatenate(chunks)[inverse]
            for chunks, inverse in zip(reps, batch.inverses, strict=True)
        ]
        loss = self._watched(_split_candidates(embeddings, batch.merged), batch.labels)
        if isinstance(loss, Terms):
            self._logged.append((embeddings[0].shape[-1], loss.detach()))
            loss = loss.total()
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    def _with_terms(self, loss: Tensor) -> Terms:
        """Take apart again what the gradient cache made one scalar of: the first term takes the gradient along.

        The terms were noted, once per dimension of `MatryoshkaLoss`.
        """
        around = self.calculate_loss
        dims, weights = (getattr(around, f"matryoshka_{name}", ()) for name in ("dims", "weights"))
        by_dim = dict(zip(dims, weights, strict=True))
        total, *others = (by_dim.get(dim, 1.0) * terms for dim, terms in self._logged)
        for terms in others:
            total = total + terms
        first = next(iter(total))
        return Terms({**total, first: total[first] + (loss - loss.detach())})

    def embed_minibatch(
        self,
        sentence_feature: dict[str, Tensor],
        begin: int,
        end: int,
        with_grad: bool,
        copy_random_state: bool,
        random_state: RandContext | None = None,
    ) -> tuple[Tensor, RandContext | None]:
        """Embed a slice of rows, replaying the random state of its first pass."""
        features = create_minibatch(sentence_feature, begin, end)
        with nullcontext() if random_state is None else random_state, nullcontext() if with_grad else torch.no_grad():
            tensors = [value for value in features.values() if isinstance(value, Tensor)]
            random_state = RandContext(*tensors) if copy_random_state else None
            return self._embed(features), random_state

    def _embed(self, features: dict[str, Any]) -> Tensor:
        return truncate_embeddings(embed(self.model, features, self.output), self.truncate_dim)


@cache
def cited(paper: str) -> str:
    """Return an entry of citations.bib by its key; `""` for none."""
    text = files("st_wkl.losses").joinpath("citations.bib").read_text(encoding="utf-8")
    entries = {entry[1]: entry[0] for entry in re.finditer(r"@\w+\{([^,]+),\n(?: .*\n)*\}\n", text)}
    return f"\n{entries[paper]}" if paper else ""


def _merge_candidates(columns: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """Merge all columns but the queries into one batch of rows; also return how many were merged, 0 if they cannot."""
    if len(columns) > 2:
        merged = merge_feature_batches(columns[1:])
        if merged is not None:
            return [columns[0], merged], len(columns) - 1
    return columns, 0


def _split_candidates(embeddings: list[Tensor], merged: int) -> list[Tensor]:
    if not merged:
        return embeddings
    query, documents = embeddings
    return [query, *documents.reshape(merged, -1, *documents.shape[1:]).unbind(0)]


def _sorted_by_length(features: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
    """Sort the rows of a batch by length, and return the order that undoes it; None where rows cannot be told apart."""
    attention_mask = features.get("attention_mask")
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        return features, None
    rows = len(attention_mask)
    tensors = {k: v for k, v in features.items() if isinstance(v, Tensor) and v.ndim > 0 and k != "prompt_length"}
    if any(len(value) != rows for value in tensors.values()):
        return features, None  # flattened images or sequences, whose rows are not these rows
    # Longest first: later mini-batches fit into the memory that earlier ones gave back, and a lack of it shows at once.
    order = attention_mask.sum(dim=1).argsort(stable=True, descending=True)
    return {**features, **{key: value[order] for key, value in tensors.items()}}, order.argsort()
