"""The losses as modules for the sentence-transformers trainers, one file each, over `st_wkl.functional`."""

from __future__ import annotations

from st_wkl.losses.adaptive_margin import AdaptiveRelevanceMarginLoss
from st_wkl.losses.in_batch import InBatchContrastiveLoss
from st_wkl.losses.list_contrastive import ListContrastiveLoss
from st_wkl.losses.margin_kl import MarginKL
from st_wkl.losses.margin_mse import MarginMSEDistillLoss
from st_wkl.losses.pair_distill import PairDistillLoss, PairwisePreferenceLoss
from st_wkl.losses.pearson import PearsonDistillLoss
from st_wkl.losses.rank_net import RankNetDistillLoss
from st_wkl.losses.regularised_kl import RegularisedKLDistillLoss
from st_wkl.losses.weighted_kl import WeightedKLDistillationLoss
from st_wkl.losses.weighted_sum import WeightedSumLoss
from st_wkl.methods.coherence import CoherenceLoss

__all__ = [
    "AdaptiveRelevanceMarginLoss",
    "CoherenceLoss",
    "InBatchContrastiveLoss",
    "ListContrastiveLoss",
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
