"""A whole run as one tree of dataclasses, which is one YAML file."""

from st_wkl.config.reading import check_training_arguments, nearest
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
