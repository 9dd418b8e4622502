"""A loss that is several: named terms, which a trainer logs and wrappers weigh and sum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
