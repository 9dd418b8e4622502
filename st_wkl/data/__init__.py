"""From texts and judgements to a dataset with teacher scores: collection, candidates, teacher, store, builder."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from st_wkl.data.builder import DistillationDatasetBuilder
    from st_wkl.data.calibration import calibrate, combine
    from st_wkl.data.candidates import (
        BM25,
        Candidate,
        Candidates,
        bm25_candidates,
        find_candidates,
        retriever_candidates,
    )
    from st_wkl.data.collection import Collection, document_text
    from st_wkl.data.dataset import DistillationDataset
    from st_wkl.data.embedding_teacher import EmbeddingTeacher
    from st_wkl.data.leaks import LeakReport, document_disjoint, find_leaks
    from st_wkl.data.pairwise import preferences, sample_pairs
    from st_wkl.data.report import plot_report, teacher_report
    from st_wkl.data.runs import hard_negative_candidates, read_run, reciprocal_rank_fusion, write_run
    from st_wkl.data.score_store import ScoreStore, ScoreStoreError, StoreInfo, default_store_path
    from st_wkl.data.scoring import estimate_scoring, score_pairs
    from st_wkl.data.selection import Selection
    from st_wkl.data.teachers import (
        CallablePairwiseTeacher,
        CallableTeacher,
        ChatListTeacher,
        ChatPairwiseTeacher,
        CrossEncoderPairwiseTeacher,
        CrossEncoderTeacher,
        EnsembleTeacher,
        FeedbackTeacher,
        RemoteTeacher,
        Teacher,
        score_lists,
    )
    from st_wkl.data.texts import EmbeddingDataset
    from st_wkl.data.vectors import TeacherVectors, VectorStore

# Where each name lives. It is imported when it is first used, so that whoever needs one file, such as the command line
# that shows the options of `Selection`, waits for no other.
_FILES = {
    "builder": "DistillationDatasetBuilder",
    "calibration": "calibrate combine",
    "candidates": "BM25 Candidate Candidates bm25_candidates find_candidates retriever_candidates",
    "collection": "Collection document_text",
    "dataset": "DistillationDataset",
    "embedding_teacher": "EmbeddingTeacher",
    "leaks": "LeakReport document_disjoint find_leaks",
    "pairwise": "preferences sample_pairs",
    "report": "plot_report teacher_report",
    "runs": "hard_negative_candidates read_run reciprocal_rank_fusion write_run",
    "score_store": "ScoreStore ScoreStoreError StoreInfo default_store_path",
    "scoring": "estimate_scoring score_pairs",
    "selection": "Selection",
    "teachers": "CallablePairwiseTeacher CallableTeacher CrossEncoderPairwiseTeacher CrossEncoderTeacher "
    "ChatListTeacher ChatPairwiseTeacher EnsembleTeacher FeedbackTeacher RemoteTeacher Teacher score_lists",
    "texts": "EmbeddingDataset",
    "vectors": "TeacherVectors VectorStore",
}

__all__ = [
    "Collection",
    "document_text",
    "Candidate",
    "Candidates",
    "BM25",
    "find_candidates",
    "bm25_candidates",
    "retriever_candidates",
    "read_run",
    "write_run",
    "reciprocal_rank_fusion",
    "hard_negative_candidates",
    "Teacher",
    "CrossEncoderTeacher",
    "CallableTeacher",
    "EnsembleTeacher",
    "FeedbackTeacher",
    "RemoteTeacher",
    "ChatListTeacher",
    "ChatPairwiseTeacher",
    "CallablePairwiseTeacher",
    "CrossEncoderPairwiseTeacher",
    "sample_pairs",
    "preferences",
    "calibrate",
    "combine",
    "ScoreStore",
    "ScoreStoreError",
    "StoreInfo",
    "default_store_path",
    "score_pairs",
    "score_lists",
    "estimate_scoring",
    "Selection",
    "find_leaks",
    "document_disjoint",
    "LeakReport",
    "teacher_report",
    "plot_report",
    "DistillationDatasetBuilder",
    "DistillationDataset",
    "EmbeddingTeacher",
    "EmbeddingDataset",
    "TeacherVectors",
    "VectorStore",
]


def __getattr__(name: str) -> Any:
    for file, names in _FILES.items():
        if name in names.split():
            return getattr(importlib.import_module(f"{__name__}.{file}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
