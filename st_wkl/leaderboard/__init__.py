"""The leaderboard is in `st_wkl.publish`; this name stays for one release."""

from __future__ import annotations

from st_wkl.publish.leaderboard import Submission, prepare
from st_wkl.publish.leaderboard_model import known_training_datasets, model_code, model_meta
from st_wkl.publish.leaderboard_results import check_results, collect

__all__ = ["Submission", "check_results", "collect", "known_training_datasets", "model_code", "model_meta", "prepare"]
