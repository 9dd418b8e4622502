"""Distillation losses as pure functions of score tensors: `(B, N)` in, a scalar out, no model and no I/O.

All functions share their conventions. Row `b` of a `(B, N)` tensor is a query, column `n` one of its candidate
documents. `mask` is True where a place holds a document, by default everywhere; a masked place may hold anything, NaN
and infinities included, and neither a value nor a gradient depends on it. A temperature divides its side's scores;
cosines need about 0.02 to 0.05. Half-precision scores are computed in float32, float32 and float64 stay as they are.
Gradients flow into the student scores, and into the teacher scores as well unless they are detached; everything is
twice differentiable. Shapes that differ, parameters out of range and unmasked teacher scores that are not finite are
ValueErrors.
"""

from __future__ import annotations

from st_wkl.functional.labels import raise_positives, swap_positives
from st_wkl.functional.listwise import (
    contrastive_weights,
    kl_divergence,
    list_contrastive,
    pearson,
    pointwise_mse,
    regularised_kl,
    student_ranks,
    weighted_kl,
)
from st_wkl.functional.margins import adaptive_relevance_margin, coherence
from st_wkl.functional.pairwise import margin_kl, margin_mse, pairwise_kl, rank_net

__all__ = [
    "weighted_kl",
    "kl_divergence",
    "regularised_kl",
    "margin_kl",
    "pairwise_kl",
    "margin_mse",
    "rank_net",
    "pearson",
    "pointwise_mse",
    "list_contrastive",
    "adaptive_relevance_margin",
    "coherence",
    "raise_positives",
    "swap_positives",
    "student_ranks",
    "contrastive_weights",
]
