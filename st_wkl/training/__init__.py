"""From a student and a distillation dataset to a trained student and the record of how it was made."""

from st_wkl.training.record import RECORD_FILE, TrainingRecord  # isort: skip (the cards read it, and `distill` writes cards)
from st_wkl.training.distillation import default_arguments, distill

__all__ = ["RECORD_FILE", "TrainingRecord", "default_arguments", "distill"]
