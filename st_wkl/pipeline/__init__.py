"""A whole run: candidates, dataset, training, evaluation and card, each stage done once and skipped from then on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from st_wkl.pipeline.import_options import ImportConfig
from st_wkl.pipeline.init import template
from st_wkl.pipeline.options import (
    CandidatesConfig,
    CollectionConfig,
    DevConfig,
    EvaluationConfig,
    LossConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
)

if TYPE_CHECKING:
    from st_wkl.pipeline.runner import STAGES, RunResult, run

__all__ = [
    "CandidatesConfig",
    "CollectionConfig",
    "DevConfig",
    "EvaluationConfig",
    "ImportConfig",
    "LossConfig",
    "RunConfig",
    "RunResult",
    "STAGES",
    "StudentConfig",
    "TeacherConfig",
    "run",
    "template",
]


def __getattr__(name: str) -> Any:
    if name in ("STAGES", "RunResult", "run"):  # what needs torch, which the command line's help does not
        from st_wkl.pipeline import runner

        return getattr(runner, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
