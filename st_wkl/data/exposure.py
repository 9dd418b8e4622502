"""Which texts a student was trained on, as hashes that travel with its weights.

A gain on test queries whose documents were training positives says something else than a gain on documents that the
student never saw. To tell the two apart later, on another machine and without the training data, the student's folder
carries hashes of its training texts; the texts themselves, which may not be redistributable, stay at home.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from st_wkl._files import write_text
from st_wkl.text import text_hash

if TYPE_CHECKING:
    from st_wkl.data.dataset import DistillationDataset

EXPOSURE_FILE = "training_texts.json"
_FORMAT = 1


@dataclass(frozen=True)
class Exposure:
    """What a student was trained on.

    Args:
        queries: Hashes of the training queries.
        positives: Hashes of the documents that stood in a training list with a gain above 0.
    """

    queries: frozenset[str]
    positives: frozenset[str]

    @classmethod
    def of(cls, dataset: DistillationDataset) -> Exposure:
        """Collect the texts of a distillation dataset.

        Example:
            >>> Exposure.of(dataset).save("student")  # doctest: +SKIP
        """
        relevant = {document_id for judged in dataset.positives().values() for document_id in judged}
        documents = dataset.documents.with_format(None)[:]
        texts = zip(documents["document_id"], documents["text"], strict=True)
        return cls(
            frozenset(text_hash(text) for text in dataset.queries["text"]),
            frozenset(text_hash(text) for key, text in texts if key in relevant),
        )

    def save(self, folder: str | Path) -> Path:
        """Write the hashes into a student's folder."""
        value = {"format": _FORMAT, "queries": sorted(self.queries), "positives": sorted(self.positives)}
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
            if value["format"] != _FORMAT:
                raise ValueError(f"format {value['format']}")
            return cls(frozenset(value["queries"]), frozenset(value["positives"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged or from another version of st-wkl ({error}). Copy it again from where the student "
                "was trained; without it, nobody can tell which test queries share documents with the training data."
            ) from error
