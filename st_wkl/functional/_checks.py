"""What is looked at in every batch, without waiting for the device.

To read a number of an accelerator is to wait for all that it still has to do. A loss therefore gathers what it has to
know, and reads it at the end of the backward pass: by then the forward pass is long computed, the device is at work on
the backward pass, and no optimizer has stepped. Where tensors are in the host's own memory, all is read at once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor

Found = Callable[[int], None]
Result = TypeVar("Result")


def waits(tensor: Tensor) -> bool:
    """Tell whether reading a tensor's values is to wait for a device."""
    return tensor.device.type != "cpu"


def check(bad: Tensor, found: Found) -> None:
    """Call `found` with the number of places where `bad` holds, if there are any: now, or when the loss is settled."""
    gathering = _GATHERING.get()
    if gathering is not None and waits(bad):
        gathering.add(bad, found)
    elif count := int(bad.sum()):
        found(count)


def checked(compute: Callable[[], Result]) -> Result:
    """Compute a loss, and see to it that what was checked on the way is known before an optimizer steps."""
    if _GATHERING.get() is not None:  # a part of what is
        return compute()
    checks = Checks()
    token = _GATHERING.set(checks)
    try:
        loss = compute()
    finally:
        _GATHERING.reset(token)
    checks.settle(loss)
    return loss


class Checks:
    """The conditions of one batch, counted where its tensors are and read together."""

    def __init__(self) -> None:
        self.open = True
        self._counts: list[Tensor] = []
        self._found: list[Found] = []
        self._host: Tensor | None = None
        self._arrived: Any = None

    def add(self, bad: Tensor, found: Found) -> None:
        """Count, without reading, the places where `bad` holds."""
        self._counts.append(bad.sum())
        self._found.append(found)

    def settle(self, loss: Any) -> None:
        """Read at the end of the loss's backward pass; at once if it has none."""
        self.open = False
        if not self._counts:
            return
        self.send()
        values = loss.values() if isinstance(loss, dict) else [loss]
        carrying = [value for value in values if isinstance(value, Tensor) and value.requires_grad]
        if not torch.is_grad_enabled() or not carrying:
            self.read()
        for value in carrying:
            value.register_hook(lambda _: _after_backward(self.read))

    def send(self) -> None:
        """Let the counts come to the host, without waiting for them."""
        self._host = counts = torch.stack(self._counts)
        if counts.device.type == "cuda":
            self._host = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
            self._host.copy_(counts, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> None:
        """Wait for the counts, and call what was to be called for those that are not 0; once."""
        if self._host is None:
            return
        if self._arrived is not None:
            self._arrived.synchronize()
        counts, found = self._host.tolist(), self._found
        self._host, self._found = None, []
        for count, call in zip(counts, found, strict=True):
            if count:
                call(count)


def watch_gradient(embeddings: list[Tensor], nothing: Callable[[], None]) -> list[Tensor]:
    """Return the embeddings, and call `nothing` if the loss that is computed of them gives them no gradient."""
    learning = [place for place, column in enumerate(embeddings) if column.requires_grad]
    if not learning or not torch.is_grad_enabled():
        return embeddings
    passed = _Watch.apply(_GATHERING.get(), nothing, *(embeddings[place] for place in learning))
    found = dict(zip(learning, passed, strict=True))
    return [found.get(place, column) for place, column in enumerate(embeddings)]


# Optimizers that divide by the gradient's size add 1e-8 to it: what is far below moves nothing.
_NO_GRADIENT = 1e-12


class _Watch(torch.autograd.Function):
    """Passes values and gradients on, and looks at the latter."""

    @staticmethod
    def forward(ctx: Any, gathering: Checks | None, nothing: Callable[[], None], *columns: Tensor) -> Any:
        ctx.gathering, ctx.nothing = gathering, nothing
        ctx.set_materialize_grads(False)
        return tuple(column.view_as(column) for column in columns)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        there = [gradient.detach() for gradient in gradients if gradient is not None and gradient.numel()]
        if there and waits(there[0]):
            none = torch.stack([gradient.abs().amax() for gradient in there]).amax() < _NO_GRADIENT
            # With the batch's own checks if they are still open, as inside a gradient cache.
            checks = ctx.gathering if ctx.gathering is not None and ctx.gathering.open else Checks()
            checks.add(none, lambda _: ctx.nothing())
            if checks is not ctx.gathering:
                checks.send()
                _after_backward(checks.read)
        elif there and all(bool(gradient.abs().amax() < _NO_GRADIENT) for gradient in there):  # one is enough
            ctx.nothing()
        return (None, None, *gradients)


def _after_backward(call: Callable[[], None]) -> None:
    from st_wkl._compat import after_backward  # brings sentence-transformers along, which functions do without

    after_backward(call)


_GATHERING: ContextVar[Checks | None] = ContextVar("checks of a batch", default=None)
