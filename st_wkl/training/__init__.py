"""From a student and a distillation dataset to a trained student and the record of how it was made."""

from st_wkl.losses.make import LOSSES, make_loss
from st_wkl.record import RECORD_FILE, TrainingRecord
from st_wkl.training.data import DrawAnewCallback
from st_wkl.training.distillation import distill
from st_wkl.training.run import Distilled
from st_wkl.training.students import default_arguments

__all__ = [
    "LOSSES",
    "RECORD_FILE",
    "Distilled",
    "DrawAnewCallback",
    "TrainingRecord",
    "default_arguments",
    "distill",
    "make_loss",
]
