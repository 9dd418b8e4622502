"""The former place of what scores lists; import it from `st_wkl.data` or `st_wkl.data.teachers`."""

from st_wkl.data.ensemble import CalibratedTeacher, EnsembleTeacher
from st_wkl.data.scoring import score_lists
from st_wkl.data.teacher import Lists, ListTeacher

__all__ = ["CalibratedTeacher", "EnsembleTeacher", "ListTeacher", "Lists", "score_lists"]
