"""Evaluation through MTEB, with per-query scores that can be compared."""

from __future__ import annotations

from st_wkl.data.candidates import BM25
from st_wkl.evaluation.compare import Comparison, compare
from st_wkl.evaluation.effects import Effect, GapClosed, compare_all, effects_table, gap_closed
from st_wkl.evaluation.evaluate import evaluate
from st_wkl.evaluation.qrels import shared_document_queries
from st_wkl.evaluation.results import Results
from st_wkl.evaluation.run_scores import evaluate_run
from st_wkl.evaluation.scores import TaskScores

__all__ = [
    "BM25",
    "evaluate",
    "evaluate_run",
    "compare",
    "compare_all",
    "effects_table",
    "gap_closed",
    "shared_document_queries",
    "Results",
    "TaskScores",
    "Comparison",
    "Effect",
    "GapClosed",
]
