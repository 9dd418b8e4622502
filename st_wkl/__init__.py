"""Teach a small, fast retriever with a strong, slow reranker."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from st_wkl.data.builder import DistillationDatasetBuilder
    from st_wkl.data.candidates import BM25
    from st_wkl.data.collator import ListwiseCollator
    from st_wkl.data.collection import Collection
    from st_wkl.data.dataset import DistillationDataset
    from st_wkl.data.remote import RemoteTeacher
    from st_wkl.data.selection import Selection
    from st_wkl.data.teachers import CrossEncoderTeacher
    from st_wkl.data.texts import EmbeddingDataset
    from st_wkl.data.vectors import VectorStore
    from st_wkl.evaluation import Results, compare, evaluate
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
    from st_wkl.losses.make import make_loss
    from st_wkl.losses.margin_kl import MarginKL, MarginMSEDistillLoss
    from st_wkl.losses.pair_distill import PairDistillLoss
    from st_wkl.losses.weighted_kl import WeightedKLDistillationLoss
    from st_wkl.losses.weighted_sum import WeightedSumLoss
    from st_wkl.pipeline import run
    from st_wkl.publish.hub import push, push_dataset, push_student
    from st_wkl.publish.model_card import write_model_card
    from st_wkl.training import distill
    from st_wkl.training.asymmetric import asymmetric_student
    from st_wkl.training.cut import cut_layers
    from st_wkl.training.lora import merge

# Where each public name lives. Importing torch and sentence-transformers takes seconds, so a name is only imported
# when it is first used; `st-wkl --help` and tab completion never pay for it.
_HOMES = {
    "WeightedKLDistillationLoss": "st_wkl.losses.weighted_kl",
    "KLDistillLoss": "st_wkl.losses.listwise",
    "MarginKL": "st_wkl.losses.margin_kl",
    "PairDistillLoss": "st_wkl.losses.pair_distill",
    "AdaptiveRelevanceMarginLoss": "st_wkl.losses.adaptive_margin",
    "PearsonDistillLoss": "st_wkl.losses.listwise",
    "MarginMSEDistillLoss": "st_wkl.losses.margin_kl",
    "RankNetDistillLoss": "st_wkl.losses.listwise",
    "RegularisedKLDistillLoss": "st_wkl.losses.listwise",
    "MSEDistillLoss": "st_wkl.losses.listwise",
    "ListContrastiveLoss": "st_wkl.losses.listwise",
    "CoherenceLoss": "st_wkl.losses.coherence",
    "EmbeddingDistillLoss": "st_wkl.losses.embedding",
    "InBatchContrastiveLoss": "st_wkl.losses.in_batch",
    "WeightedSumLoss": "st_wkl.losses.weighted_sum",
    "ListwiseCollator": "st_wkl.data.collator",
    "DistillationDatasetBuilder": "st_wkl.data.builder",
    "CrossEncoderTeacher": "st_wkl.data.teachers",
    "RemoteTeacher": "st_wkl.data.remote",
    "Collection": "st_wkl.data.collection",
    "DistillationDataset": "st_wkl.data.dataset",
    "EmbeddingDataset": "st_wkl.data.texts",
    "VectorStore": "st_wkl.data.vectors",
    "Selection": "st_wkl.data.selection",
    "BM25": "st_wkl.data.candidates",
    "distill": "st_wkl.training",
    "make_loss": "st_wkl.losses.make",
    "asymmetric_student": "st_wkl.training.asymmetric",
    "cut_layers": "st_wkl.training.cut",
    "merge": "st_wkl.training.lora",
    "evaluate": "st_wkl.evaluation",
    "compare": "st_wkl.evaluation",
    "Results": "st_wkl.evaluation",
    "run": "st_wkl.pipeline",
    "write_model_card": "st_wkl.publish.model_card",
    "push": "st_wkl.publish.hub",
    "push_student": "st_wkl.publish.hub",
    "push_dataset": "st_wkl.publish.hub",
}

__all__ = [
    "WeightedKLDistillationLoss",
    "KLDistillLoss",
    "MarginKL",
    "PairDistillLoss",
    "AdaptiveRelevanceMarginLoss",
    "PearsonDistillLoss",
    "MarginMSEDistillLoss",
    "RankNetDistillLoss",
    "RegularisedKLDistillLoss",
    "MSEDistillLoss",
    "ListContrastiveLoss",
    "CoherenceLoss",
    "EmbeddingDistillLoss",
    "InBatchContrastiveLoss",
    "WeightedSumLoss",
    "ListwiseCollator",
    "DistillationDatasetBuilder",
    "CrossEncoderTeacher",
    "RemoteTeacher",
    "Collection",
    "DistillationDataset",
    "EmbeddingDataset",
    "VectorStore",
    "Selection",
    "BM25",
    "distill",
    "make_loss",
    "asymmetric_student",
    "cut_layers",
    "merge",
    "evaluate",
    "compare",
    "Results",
    "run",
    "write_model_card",
    "push",
    "push_student",
    "push_dataset",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
