"""Several losses on one forward pass, each logged under its own name."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from st_wkl.functional._scores import is_number
from st_wkl.losses.cached import StudentLoss, Terms
from st_wkl.losses.lists import holds_lists
from st_wkl.losses.options import spelled_out

if TYPE_CHECKING:
    from st_wkl.losses.scoring import Student


@spelled_out
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
        ValueError: If there is no term, a weight is out of range, or a term was made over another model or with a
            gradient cache of its own.
        TypeError: If a term is no `(weight, loss)` pair, or does not compute from embeddings.

    Example:
        >>> from sentence_transformers import SentenceTransformer
        >>> from st_wkl import InBatchContrastiveLoss, WeightedKLDistillationLoss
        >>> student = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")  # doctest: +SKIP
        >>> terms = [(1, WeightedKLDistillationLoss(student)), (0.1, InBatchContrastiveLoss(student))]  # doctest: +SKIP
        >>> loss = WeightedSumLoss(student, terms)  # doctest: +SKIP
    """

    def __init__(
        self, model: Student, terms: Sequence[tuple[float, nn.Module]], *, mini_batch_size: int | None = None
    ) -> None:
        super().__init__(model, mini_batch_size=mini_batch_size)
        if not terms:
            raise ValueError("WeightedSumLoss needs at least one (weight, loss) term.")
        for term in terms:
            _check_term(term, model)
        self.weights = [weight for weight, _ in terms]
        self.losses = nn.ModuleList([loss for _, loss in terms])
        seen: Counter[str] = Counter()
        self.names: list[str] = []
        for loss in self.losses:
            name = type(loss).__name__
            seen[name] += 1
            self.names.append(name if seen[name] == 1 else f"{name}_{seen[name]}")

    def loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None) -> Terms:
        """Compute every term from the same embeddings; labels as the terms need them."""
        found = Terms()
        for name, weight, loss in zip(self.names, self.weights, self.losses, strict=True):
            if holds_lists(labels) and type(loss).__module__.startswith("sentence_transformers."):
                raise ValueError(
                    f"{type(loss).__name__} takes columns, and would take the documents of these lists for the "
                    "positives of its queries, one after the other. Train the sum on DistillationDataset.to_columns() "
                    "without ListwiseCollator, or take st_wkl's own: InBatchContrastiveLoss contrasts lists."
                )
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
        return config if self.mini_batch_size is None else {**config, "mini_batch_size": self.mini_batch_size}

    @property
    def citation(self) -> str:
        """BibTeX of all terms, for the model card."""
        citations = dict.fromkeys(str(getattr(loss, "citation", "")).strip() for loss in self.losses)
        return "\n".join(citation for citation in citations if citation)


def _check_term(term: Any, model: Student) -> None:
    """Stop at what cannot be a term of a sum over a model."""
    pair = tuple(term) if isinstance(term, Sequence) and not isinstance(term, str) else (term,)
    if len(pair) != 2 or not isinstance(pair[1], nn.Module):
        told = ", ".join(type(part).__name__ if isinstance(part, nn.Module) else repr(part) for part in pair)
        turned = " Turn it round." if len(pair) == 2 and isinstance(pair[0], nn.Module) else ""
        raise TypeError(f"the terms of WeightedSumLoss are (weight, loss) pairs, and one is ({told}).{turned}")
    weight, loss = pair
    name = type(loss).__name__
    if not (is_number(weight) and weight >= 0):
        raise ValueError(f"the weight of {name} is {weight!r}; it must be a finite number of 0 or more.")
    # Some of upstream's parts take embeddings alone.
    compute = getattr(loss, "compute_loss_from_embeddings", None)
    if compute is None or len(inspect.signature(compute).parameters) < 2:
        raise TypeError(
            f"{name} cannot be a term of WeightedSumLoss: it has no method "
            "compute_loss_from_embeddings(embeddings, labels), so it would need a forward pass of its own."
        )
    if getattr(loss, "uses_gradient_cache", False):
        raise ValueError(
            f"{name} has a gradient cache of its own. Make it without mini_batch_size and give mini_batch_size to "
            "WeightedSumLoss, which embeds the batch for all terms."
        )
    if getattr(loss, "model", None) not in (None, model):
        raise ValueError(
            f"{name} was made over another model than the sum, so it would look at one student's embeddings with the "
            f"settings of another: make {name} with the model that the sum is made with."
        )
