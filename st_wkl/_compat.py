"""The one place that touches names which other packages do not promise to keep.

Seen in sentence-transformers 6.0 to 6.2: `base.losses.gradcache._create_minibatch` slices a batch of features and drops
the padding that a slice no longer needs; a cached loss of another model class has no public way to do the same.

Seen in sentence-transformers 6.0 to 6.2: `MatryoshkaLoss` and `AdaptiveLayerLoss` put a `ForwardDecorator` in the place
of a model's `forward` while they call the loss that they wrap; there is no public way for that loss to know.

Seen in sentence-transformers 6.0 to 6.2: `BaseModel._model_card_text`, the README.md that a model was loaded with.

Seen in transformers 5.0 to 5.23: `PretrainedConfig._commit_hash`, the commit of the Hub that a model was loaded from.

Seen in torch 2.2 to 2.13: `Variable._execution_engine.queue_callback`, with which FSDP, too, does something at the end
of a backward pass.

Seen in torch 2.2 to 2.13: `Tensor._version`, which counts the changes in place, and which inference tensors lack;
`Module._forward_hooks` and `Module._forward_pre_hooks`, the functions that take part in a forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sentence_transformers.base.losses.gradcache import _create_minibatch as create_minibatch
from sentence_transformers.sentence_transformer.losses import adaptive_layer, matryoshka
from torch.autograd import Variable

__all__ = ["after_backward", "card_text", "commit_of", "create_minibatch", "hooks_of", "version_of", "wrapper_at_work"]


def after_backward(call: Callable[[], None]) -> None:
    """Call something at the end of the backward pass that is under way; what it raises, `backward` raises."""
    Variable._execution_engine.queue_callback(call)  # type: ignore[no-untyped-call]


def card_text(model: Any) -> str:
    """Return the card that a model was loaded with, `""` if there was none."""
    return getattr(model, "_model_card_text", None) or ""


def version_of(tensor: Any) -> int:
    """Return how often a tensor was changed in place, as a step of an optimizer does; 0 where nobody counts."""
    return 0 if tensor.is_inference() else int(tensor._version)


def hooks_of(module: Any) -> list[Any]:
    """Return the functions that were registered to run before or after a module's forward pass."""
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def commit_of(config: Any) -> str | None:
    """Return the commit of the Hub that a configuration was loaded from, None for a folder."""
    return getattr(config, "_commit_hash", None)


def wrapper_at_work(model: Any) -> str | None:
    """Name the wrapper loss that has taken over the forward pass of a model, None if none has."""
    found = None
    while model is not None:
        forward = vars(model).get("forward")
        while isinstance(forward, (matryoshka.ForwardDecorator, adaptive_layer.ForwardDecorator)):
            if isinstance(forward, adaptive_layer.ForwardDecorator):
                return "AdaptiveLayerLoss"
            found, forward = "MatryoshkaLoss", forward.fn
        model = getattr(model, "_orig_mod", getattr(model, "module", None))  # compiled, or distributed
    return found
