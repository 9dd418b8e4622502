"""What MTEB's leaderboard asks for: the entry of the model, and its results by the rules of their repository."""

from __future__ import annotations

from st_wkl.leaderboard.model import known_training_datasets, model_code, model_meta
from st_wkl.leaderboard.prepare import Submission, prepare
from st_wkl.leaderboard.results import check_results, collect

__all__ = ["Submission", "check_results", "collect", "known_training_datasets", "model_code", "model_meta", "prepare"]
