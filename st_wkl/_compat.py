"""The one place that touches names which other packages do not promise to keep.

Seen in sentence-transformers 6.0 to 6.2: `base.losses.gradcache._create_minibatch` slices a batch of features and drops
the padding that a slice no longer needs; a cached loss of another model class has no public way to do the same.

Seen in sentence-transformers 6.0 to 6.2: `BaseModel._model_card_text`, the README.md that a model was loaded with.

Seen in transformers 5.0 to 5.23: `PretrainedConfig._commit_hash`, the commit of the Hub that a model was loaded from.

Seen in torch 2.2 to 2.13: `Tensor._version`, which counts the changes in place, and which inference tensors lack.
"""

from __future__ import annotations

from typing import Any

from sentence_transformers.base.losses.gradcache import _create_minibatch as create_minibatch

__all__ = ["card_text", "commit_of", "create_minibatch", "version_of"]


def card_text(model: Any) -> str:
    """Return the card that a model was loaded with, `""` if there was none."""
    return getattr(model, "_model_card_text", None) or ""


def version_of(tensor: Any) -> int:
    """Return how often a tensor was changed in place, as a step of an optimizer does; 0 where nobody counts."""
    return 0 if tensor.is_inference() else int(tensor._version)


def commit_of(config: Any) -> str | None:
    """Return the commit of the Hub that a configuration was loaded from, None for a folder."""
    return getattr(config, "_commit_hash", None)
