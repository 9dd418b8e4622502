"""From texts and judgements to a dataset with teacher scores: collection, candidates, teacher, store, builder."""

from __future__ import annotations

from st_wkl.data.builder import DistillationDatasetBuilder
from st_wkl.data.candidates import Candidate, Candidates, bm25_candidates
from st_wkl.data.collection import Collection, document_text
from st_wkl.data.dataset import DistillationDataset
from st_wkl.data.score_store import ScoreStore, ScoreStoreError, default_store_path
from st_wkl.data.scoring import score_pairs
from st_wkl.data.teachers import CrossEncoderTeacher, Teacher

__all__ = [
    "Collection",
    "document_text",
    "Candidate",
    "Candidates",
    "bm25_candidates",
    "Teacher",
    "CrossEncoderTeacher",
    "ScoreStore",
    "ScoreStoreError",
    "default_store_path",
    "score_pairs",
    "DistillationDatasetBuilder",
    "DistillationDataset",
]
