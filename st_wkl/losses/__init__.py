"""The losses as modules for the sentence-transformers trainers, one file each, over `st_wkl.functional`."""

from __future__ import annotations

from st_wkl.losses.in_batch import InBatchContrastiveLoss
from st_wkl.losses.margin_kl import MarginKL
from st_wkl.losses.weighted_kl import WeightedKLDistillationLoss
from st_wkl.losses.weighted_sum import WeightedSumLoss

__all__ = ["InBatchContrastiveLoss", "MarginKL", "WeightedKLDistillationLoss", "WeightedSumLoss"]
