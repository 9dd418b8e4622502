"""Teachers: what gives a (query, document) pair its score. Cross-encoders, any function, and several at once."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from st_wkl.data.cross_encoder import CrossEncoderTeacher
from st_wkl.data.ensemble import CalibratedTeacher, EnsembleTeacher
from st_wkl.data.pairwise import CallablePairwiseTeacher, CrossEncoderPairwiseTeacher
from st_wkl.data.scoring import score_lists
from st_wkl.data.similarity import SimilarityTeacher
from st_wkl.data.teacher import CallableTeacher, ListTeacher, PairwiseTeacher, Teacher

__all__ = [
    "Teacher",
    "CrossEncoderTeacher",
    "CallableTeacher",
    "SimilarityTeacher",
    "ListTeacher",
    "EnsembleTeacher",
    "CalibratedTeacher",
    "FeedbackTeacher",  # noqa: F822 - from a higher room, when it is asked for
    "TokenFeedbackTeacher",  # noqa: F822
    "PairwiseTeacher",
    "CallablePairwiseTeacher",
    "CrossEncoderPairwiseTeacher",
    "RemoteTeacher",  # noqa: F822 - with what it needs to speak HTTP
    "ChatPairwiseTeacher",  # noqa: F822
    "ChatListTeacher",  # noqa: F822
    "score_lists",
]
_LATER = {
    "FeedbackTeacher": "st_wkl.methods.collective",
    "TokenFeedbackTeacher": "st_wkl.methods.collective",
    "RemoteTeacher": "st_wkl.data.remote",
    "ChatPairwiseTeacher": "st_wkl.data.judge",
    "ChatListTeacher": "st_wkl.data.judge",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
