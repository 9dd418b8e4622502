"""The leaderboard is in `st_wkl.publish`; this name stays for one release."""

from __future__ import annotations

from st_wkl.publish.leaderboard import Submission, check_results, collect, model_code, prepare
from st_wkl.publish.leaderboard_model import known_training_datasets, model_meta

__all__ = ["Submission", "check_results", "collect", "known_training_datasets", "model_code", "model_meta", "prepare"]
