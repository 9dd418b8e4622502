"""How a student was made and what it has seen, as files beside its weights.

A gain on test queries whose documents were training positives says something else than a gain on documents that the
student never saw. To tell the two apart later, on another machine and without the training data, the student's folder
carries hashes of its training texts; the texts themselves, which may not be redistributable, stay at home.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from st_wkl.files import write_text
from st_wkl.text import text_hash

if TYPE_CHECKING:
    from st_wkl.data.dataset import DistillationDataset

RECORD_FILE = "distillation.json"
EXPOSURE_FILE = "training_texts.json"
_EXPOSURE_FORMAT = 1
_UNJUDGED = ("unjudged_queries", "teacher_positives")


def collection_of(provenance: Mapping[str, Any]) -> str:
    """Return the name of the collection that a dataset was made of, `""` where its provenance does not say."""
    collection = provenance.get("collection")
    return str((collection.get("name") if isinstance(collection, Mapping) else collection) or "")


@dataclass(repr=False)
class TrainingRecord:
    """How a student was made; saved beside its weights, and what its card is written from.

    Args:
        student: Name of the model that training started from.
        loss: Class name of the loss; where datasets have different ones all, with commas.
        loss_config: The loss's parameters; where datasets have losses of their own, these by the datasets' names.
        loss_citation: BibTeX of the loss.
        teacher: Identity of the teacher, as the dataset has it.
        dataset: Provenance of the distillation dataset; of several, that of each by its name in `datasets`.
        arguments: The most important training arguments, and all that can matter and are not at their default.
        seconds: Wall-clock time of training.
        versions: Versions of the packages that took part.
        lora: Rank, alpha, targets and share of trainable weights of the adapter; empty where all weights were trained.
        dev: The dev split's nDCG@10 before training and of the student that was kept; empty without a dev split.
        student_license: What the card of the model that training started from states; empty where it states none.
        prompts: What stood before queries and documents, in training as in use; empty without prompts.
        precision: Number types of the weights as they were `loaded`, `trained` and `saved`. Empty in records of earlier
            versions, which trained them as they were loaded.
        command: The command that makes the student, without folders of this machine; empty where none was typed.
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
    command: str = field(default_factory=str)

    def __repr__(self) -> str:
        """Show in a line how the student was made; `save` writes all of it."""
        teacher = self.teacher.get("model") or self.teacher.get("kind") or "no teacher that is known"
        rows = "" if "rows_trained" not in self.dataset else f" on {self.dataset['rows_trained']:,} lists"
        how = ", an adapter," if self.lora else ""
        return f"TrainingRecord: {self.student}{how} by {self.loss}{rows} from {teacher}, {self.seconds:,.0f} s"

    @property
    def datasets(self) -> dict[str, dict[str, Any]]:
        """The provenance of each dataset by its name; a single one goes by its collection's."""
        found: dict[str, dict[str, Any]] = self.dataset.get("datasets") or {collection_of(self.dataset): self.dataset}
        return found

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


@dataclass(frozen=True, repr=False)
class Exposure:
    """What a student was trained on.

    Args:
        queries: Hashes of the training queries.
        positives: Hashes of the documents that training has shown as good ones: with a gain above 0, as the teacher's
            best of a list without any, or by their embedding.
        unjudged_queries: Number of the queries without a judged positive.
        teacher_positives: Number of these whose positive is the teacher's best document, one of `positives`.
    """

    queries: frozenset[str]
    positives: frozenset[str]
    unjudged_queries: int = 0
    teacher_positives: int = 0

    def __repr__(self) -> str:
        """Show how many there are."""
        told = f", {self.unjudged_queries:,} queries without a judged one" if self.unjudged_queries else ""
        return f"Exposure(hashes of {len(self.queries):,} queries and {len(self.positives):,} positives{told})"

    @classmethod
    def of(cls, *datasets: DistillationDataset) -> Exposure:
        """Collect the texts of distillation datasets."""
        queries: set[str] = set()
        positives: set[str] = set()
        for dataset in datasets:
            relevant = dataset.seen_as_relevant()
            documents = dataset.documents.with_format(None)[:]
            texts = zip(documents["document_id"], documents["text"], strict=True)
            queries |= {text_hash(text) for text in dataset.queries["text"]}
            shown = {text_hash(text) for key, text in texts if key in relevant}
            positives |= shown
            if not len(dataset.queries):  # texts of any kind, as a file of questions has
                queries |= shown
        found = [dataset.unjudged() for dataset in datasets]
        return cls(frozenset(queries), frozenset(positives), *(sum(one[name] for one in found) for name in _UNJUDGED))

    def save(self, folder: str | Path) -> Path:
        """Write the hashes into a student's folder."""
        value = {"format": _EXPOSURE_FORMAT, "queries": sorted(self.queries), "positives": sorted(self.positives)}
        if self.unjudged_queries:
            value |= {name: getattr(self, name) for name in _UNJUDGED}
        return write_text(Path(folder) / EXPOSURE_FILE, json.dumps(value) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Exposure | None:
        """Read the hashes of a student's folder; None where it carries none, as any model that was not distilled here.

        Raises:
            ValueError: If the file is damaged or of a newer version.
        """
        path = Path(folder).expanduser() / EXPOSURE_FILE
        if not path.is_file():
            return None
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            if value["format"] != _EXPOSURE_FORMAT:
                raise ValueError(f"format {value['format']}")
            told = {name: int(value.get(name, 0)) for name in _UNJUDGED}
            return cls(frozenset(value["queries"]), frozenset(value["positives"]), **told)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged or from another version of st-wkl ({error}). Copy it again from where the student "
                "was trained; without it, nobody can tell which test queries share documents with the training data."
            ) from error
