"""A whole run as one tree of dataclasses, which is one YAML file."""

from st_wkl.config.tree import (
    CandidatesConfig,
    CollectionConfig,
    DevConfig,
    EvaluationConfig,
    LossConfig,
    RunConfig,
    SelectionConfig,
    StudentConfig,
    TeacherConfig,
)
from st_wkl.config.yaml_template import template
from st_wkl.ranges import nearest
from st_wkl.reading import check_training_arguments

__all__ = [
    "CandidatesConfig",
    "CollectionConfig",
    "DevConfig",
    "EvaluationConfig",
    "LossConfig",
    "RunConfig",
    "SelectionConfig",
    "StudentConfig",
    "TeacherConfig",
    "check_training_arguments",
    "nearest",
    "template",
]
