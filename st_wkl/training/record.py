"""How a student was made, as a file beside its weights."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from st_wkl._files import write_text

RECORD_FILE = "distillation.json"


@dataclass
class TrainingRecord:
    """How a student was made; saved beside its weights, and what its card is written from.

    Args:
        student: Name of the model that training started from.
        loss: Class name of the loss.
        loss_config: The loss's parameters.
        loss_citation: BibTeX of the loss.
        teacher: Identity of the teacher, as the dataset has it.
        dataset: Provenance of the distillation dataset.
        arguments: The most important training arguments, and all that can matter and are not at their default.
        seconds: Wall-clock time of training.
        versions: Versions of the packages that took part.
        lora: Rank, alpha, targets and share of trainable weights of the adapter; empty where all weights were trained.
        dev: The dev split's nDCG@10 before training and of the student that was kept; empty without a dev split.
        student_license: What the card of the model that training started from states; empty where it states none.
        prompts: What stood before queries and documents, in training as in use; empty without prompts.
        precision: Number types of the weights as they were `loaded`, `trained` and `saved`. Empty in records of earlier
            versions, which trained them as they were loaded.
        run: A hash of `identity`.
        identity: All that decides the outcome, by which a run that is started again knows its student. Empty in records
            of earlier versions, whose `run` is a hash of less.
    """

    student: str
    loss: str
    loss_config: dict[str, Any]
    loss_citation: str
    teacher: dict[str, Any]
    dataset: dict[str, Any]
    arguments: dict[str, Any]
    seconds: float
    versions: dict[str, str]
    lora: dict[str, Any] = field(default_factory=dict)
    dev: dict[str, float] = field(default_factory=dict)
    student_license: str = field(default_factory=str)  # no plain default: `load` takes these as in every version
    prompts: dict[str, str] = field(default_factory=dict)
    run: str = field(default_factory=str)
    identity: dict[str, Any] = field(default_factory=dict)
    precision: dict[str, str] = field(default_factory=dict)

    def save(self, folder: str | Path) -> Path:
        """Write the record into a student's folder."""
        return write_text(Path(folder) / RECORD_FILE, json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> TrainingRecord:
        """Read the record of a student's folder.

        Raises:
            FileNotFoundError: If the folder holds no record, so the student was not made by `distill`.
            ValueError: If the record is damaged or of another version.
        """
        path = Path(folder).expanduser() / RECORD_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: only students that `distill` saved carry a record.")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            known = [field.name for field in fields(cls) if field.name in values or field.default_factory is MISSING]
            return cls(**{name: values[name] for name in known})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged or from another version ({error}). Train the student again."
            ) from error
