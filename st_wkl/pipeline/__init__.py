"""A whole run: candidates, dataset, training, evaluation and card, each stage done once and skipped from then on."""

from st_wkl.pipeline.runner import RunResult, run
from st_wkl.pipeline.stages import STAGES

__all__ = ["STAGES", "RunResult", "run"]
