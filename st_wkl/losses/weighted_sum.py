"""Several losses on one forward pass, each logged under its own name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from st_wkl.losses.cached import StudentLoss
from st_wkl.losses.terms import Terms

if TYPE_CHECKING:
    from st_wkl.losses.scoring import Student


class WeightedSumLoss(StudentLoss):
    """A weighted sum of losses that share one forward pass over the batch.

    Each term is logged under its name by the trainer. Any loss takes part that computes from embeddings
    (`compute_loss_from_embeddings`), upstream's included, as long as it understands the batch: upstream's need columns
    (query, positive, negative_1, …), those of this package also take the lists of `ListwiseCollator`.

    Args:
        model: The student that all terms were made with.
        terms: `(weight, loss)` pairs. A weight may be 0, which still logs the term.
        mini_batch_size: Rows that are embedded at once; bounds memory at the price of a second forward pass. Set it
            here, not on the terms, whose own setting does not act inside a sum.

    Raises:
        ValueError: If there is no term, a weight is not finite, or a term has a gradient cache of its own.
        TypeError: If a term does not compute from embeddings.

    Example:
        >>> from sentence_transformers import SentenceTransformer
        >>> from st_wkl import InBatchContrastiveLoss, WeightedKLDistillationLoss, WeightedSumLoss
        >>> student = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")  # doctest: +SKIP
        >>> terms = [(1.0, WeightedKLDistillationLoss(student)), (0.1, InBatchContrastiveLoss(student))]  # doctest: +SKIP
        >>> loss = WeightedSumLoss(student, terms)  # doctest: +SKIP
    """  # noqa: E501

    def __init__(
        self,
        model: Student,
        terms: Sequence[tuple[float, nn.Module]],
        *,
        mini_batch_size: int | None = None,
    ) -> None:
        super().__init__(model, mini_batch_size)
        if not terms:
            raise ValueError("WeightedSumLoss needs at least one (weight, loss) term.")
        for weight, loss in terms:
            if not 0 <= weight < math.inf:
                raise ValueError(
                    f"the weight of {type(loss).__name__} is {weight}; it must be a finite number of 0 or more."
                )
            if not _computes_from_embeddings(loss):
                raise TypeError(
                    f"{type(loss).__name__} cannot be a term of WeightedSumLoss: it has no method "
                    "compute_loss_from_embeddings(embeddings, labels), so it would need a forward pass of its own."
                )
            if getattr(loss, "uses_gradient_cache", False):
                raise ValueError(
                    f"{type(loss).__name__} has a gradient cache of its own. Make it without mini_batch_size and give "
                    "mini_batch_size to WeightedSumLoss, which embeds the batch for all terms."
                )
        self.weights = [weight for weight, _ in terms]
        self.losses = nn.ModuleList([loss for _, loss in terms])
        self.names = list(_unique_names(self.losses))

    def loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None) -> Terms:
        """Compute every term from the same embeddings; labels as the terms need them."""
        found = Terms()
        for name, weight, loss in zip(self.names, self.weights, self.losses, strict=True):
            # A term that only logs has no gradient that could be missed.
            only_logs = weight == 0 and isinstance(loss, StudentLoss)
            compute: Any = loss.loss_from_embeddings if only_logs else loss.compute_loss_from_embeddings
            value = compute(embeddings, labels)
            parts = {f"{name}_{part}": value[part] for part in value} if isinstance(value, dict) else {name: value}
            found |= {part: weight * term for part, term in parts.items()}
        return found

    def _watched(self, embeddings: list[Tensor], labels: Tensor | None) -> Any:
        return self.loss_from_embeddings(embeddings, labels)  # each term is

    def get_config_dict(self) -> dict[str, Any]:
        """Return weights and parameters of all terms for the model card."""
        config: dict[str, Any] = {
            name: {"weight": weight, **loss.get_config_dict()}  # type: ignore[operator]
            for name, weight, loss in zip(self.names, self.weights, self.losses, strict=True)
        }
        if self.mini_batch_size is not None:
            config["mini_batch_size"] = self.mini_batch_size
        return config

    @property
    def citation(self) -> str:
        """BibTeX of all terms, for the model card."""
        citations = dict.fromkeys(str(getattr(loss, "citation", "")).strip() for loss in self.losses)
        return "\n".join(citation for citation in citations if citation)


def _computes_from_embeddings(loss: nn.Module) -> bool:
    """Tell whether a loss takes embeddings and labels; some of upstream's parts take the former alone."""
    compute = getattr(loss, "compute_loss_from_embeddings", None)
    return compute is not None and len(inspect.signature(compute).parameters) > 1


def _unique_names(losses: Sequence[nn.Module] | nn.ModuleList) -> Iterator[str]:
    seen: dict[str, int] = {}
    for loss in losses:
        name = type(loss).__name__
        seen[name] = seen.get(name, 0) + 1
        yield name if seen[name] == 1 else f"{name}_{seen[name]}"
