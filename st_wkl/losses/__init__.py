"""The losses as modules for the sentence-transformers trainers, over `st_wkl.functional`."""

from __future__ import annotations

from st_wkl.losses.adaptive_margin import AdaptiveRelevanceMarginLoss
from st_wkl.losses.coherence import CoherenceLoss
from st_wkl.losses.embedding import EmbeddingDistillLoss
from st_wkl.losses.in_batch import InBatchContrastiveLoss
from st_wkl.losses.listwise import (
    KLDistillLoss,
    ListContrastiveLoss,
    MSEDistillLoss,
    PearsonDistillLoss,
    RankNetDistillLoss,
    RegularisedKLDistillLoss,
)
from st_wkl.losses.margin_kl import MarginKL, MarginMSEDistillLoss
from st_wkl.losses.pair_distill import PairDistillLoss, PairwisePreferenceLoss
from st_wkl.losses.weighted_kl import WeightedKLDistillationLoss
from st_wkl.losses.weighted_sum import WeightedSumLoss

__all__ = [
    "AdaptiveRelevanceMarginLoss",
    "CoherenceLoss",
    "EmbeddingDistillLoss",
    "InBatchContrastiveLoss",
    "KLDistillLoss",
    "ListContrastiveLoss",
    "MSEDistillLoss",
    "MarginKL",
    "MarginMSEDistillLoss",
    "PairDistillLoss",
    "PairwisePreferenceLoss",
    "PearsonDistillLoss",
    "RankNetDistillLoss",
    "RegularisedKLDistillLoss",
    "WeightedKLDistillationLoss",
    "WeightedSumLoss",
]
