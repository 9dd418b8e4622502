"""From a student and a distillation dataset to a trained student and the record of how it was made."""

from st_wkl.losses.make import LOSSES, make_loss
from st_wkl.record import RECORD_FILE, TrainingRecord
from st_wkl.training.distillation import Distilled, distill
from st_wkl.training.students import default_arguments

__all__ = ["LOSSES", "RECORD_FILE", "Distilled", "TrainingRecord", "default_arguments", "distill", "make_loss"]
