"""The losses as modules for the sentence-transformers trainers, one file each, over `st_wkl.functional`."""

from __future__ import annotations

from st_wkl.losses.margin_kl import MarginKL
from st_wkl.losses.weighted_kl import WeightedKLDistillationLoss

__all__ = ["MarginKL", "WeightedKLDistillationLoss"]
