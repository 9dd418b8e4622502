"""Evaluation through MTEB, with per-query scores that can be compared."""

from __future__ import annotations

import sys

from st_wkl.data.candidates import BM25
from st_wkl.evaluation import report, results, runs
from st_wkl.evaluation.compare import Comparison, compare, holm, paired_difference
from st_wkl.evaluation.effects import Effect, GapClosed, compare_all, effects_table, gap_closed
from st_wkl.evaluation.evaluate import estimate, evaluate
from st_wkl.evaluation.report import plot_effects, write_report
from st_wkl.evaluation.results import Results, TaskScores, results_table
from st_wkl.evaluation.runs import evaluate_run, shared_document_queries

__all__ = [
    "BM25",
    "estimate",
    "evaluate",
    "evaluate_run",
    "compare",
    "compare_all",
    "effects_table",
    "gap_closed",
    "holm",
    "paired_difference",
    "plot_effects",
    "results_table",
    "shared_document_queries",
    "write_report",
    "Results",
    "TaskScores",
    "Comparison",
    "Effect",
    "GapClosed",
]

# Paths of version 0.1, for one release.
for _old, _home in {"scores": results, "tables": results, "run_scores": runs, "qrels": runs, "plots": report}.items():
    sys.modules[f"{__name__}.{_old}"] = _home
