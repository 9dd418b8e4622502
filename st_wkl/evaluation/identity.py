"""Who is evaluated: MTEB's wrapper of a model under its own name and revision.

MTEB names a local model `no_model_name/available`, a model that was fine-tuned in memory after its base, and a
cross-encoder after its folder, and looks results up by that name. Here the revision is a hash of weights and settings.
Importing this module imports MTEB, which takes seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from mteb.models import CrossEncoderWrapper, ModelMeta, SentenceTransformerEncoderWrapper
from mteb.models.sentence_transformer_wrapper import MultiVectorWrapper, SparseEncoderWrapper
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SparseEncoder

from st_wkl.data.cross_encoder import CrossEncoderTeacher
from st_wkl.data.teacher import as_scores
from st_wkl.files import content_hash, expanded
from st_wkl.model_files import onnx_file, torch_files
from st_wkl.models import model_name, model_revision
from st_wkl.packaged import named

if TYPE_CHECKING:
    from mteb.models import MTEBModels

    from st_wkl.data.teacher import Teacher
    from st_wkl.models import AnyModel

_WRAPPERS: dict[type, Any] = {
    CrossEncoder: CrossEncoderWrapper,
    SparseEncoder: SparseEncoderWrapper,
    MultiVectorEncoder: MultiVectorWrapper,
}
FILES = {".csv", ".gz", ".json", ".jsonl", ".parquet", ".run", ".trec", ".tsv", ".txt"}


def identified(model: AnyModel, *, name: str | None = None, revision: str | None = None) -> MTEBModels:
    """Wrap a model for MTEB under its own name and revision, so that no cache takes it for another one.

    Args:
        model: One of the four model classes.
        name: None for `model_name(model)`. MTEB wants `organization/name`; a plain name is put under `local/`.
        revision: None for `model_revision(model)`.

    Returns:
        MTEB's wrapper of the model, which `mteb.evaluate` takes, with any cache.
    """
    told = _told(name or model_name(model), revision or model_revision(model))  # MTEB replaces half-precision heads
    dense: Any = SentenceTransformerEncoderWrapper
    wrapped: Any = next((wrapper for cls, wrapper in _WRAPPERS.items() if isinstance(model, cls)), dense)(model)
    wrapped.mteb_model_meta = wrapped.mteb_model_meta.model_copy(update=told)
    return cast("MTEBModels", wrapped)


class TeacherWrapper:
    """A teacher as a reranker that MTEB runs, under the identity that its stored scores have.

    Args:
        teacher: What `score_pairs` takes: an exported cross-encoder, a function, any other.
        name: None for what its identity calls the model.
        revision: None for a hash of its identity.
    """

    def __init__(self, teacher: Teacher, name: str | None = None, revision: str | None = None) -> None:
        known = teacher.identity
        name = name or str(known.get("model") or type(teacher).__name__)
        self.teacher = teacher
        self.about = {"name": name, "class": type(teacher).__name__, "settings": known}
        self.mteb_model_meta = ModelMeta.create_empty(overwrites=_told(name, revision or content_hash(known)))

    @classmethod
    def of(cls, model: Any, name: str | None = None, revision: str | None = None) -> TeacherWrapper | None:
        """Return the teacher that `model` means, None if sentence-transformers has a class for it."""
        if hasattr(model, "identity") and hasattr(model, "score"):
            return cls(model, name, revision)
        if not isinstance(model, str | Path):
            return None
        source, called = named(str(model))
        exported = onnx_file(Path(source)) if Path(source).is_dir() and not torch_files(Path(source)) else None
        return None if exported is None else cls(CrossEncoderTeacher(source), name or called, revision)

    def predict(self, inputs1: Any, inputs2: Any, **_: Any) -> np.ndarray:
        """Return the scores of pairs that come in two loaders."""
        queries, documents = ([text for batch in inputs for text in batch["text"]] for inputs in (inputs1, inputs2))
        pairs = list(zip(queries, documents, strict=True))
        return as_scores(self.teacher.score(pairs), pairs)


def check_source(source: Any, what: str, takes: str, *, file: bool = False) -> None:
    """Refuse a name that is no folder and cannot be a Hub id at once, where the Hub would be asked again and again.

    Args:
        source: What was given; anything but text and paths passes.
        what: What it was given as, such as `"model"`.
        takes: What to give instead.
        file: Whether a file is what it takes, too.

    Raises:
        FileNotFoundError: If it is such a name, or is called like a file.
        ValueError: If it is a file.
    """
    if not isinstance(source, str | Path) or str(source).startswith("packaged:") or Path(expanded(source)).is_dir():
        return
    there = Path(expanded(source)).is_file()
    if there and file:
        return
    if there or Path(source).suffix.lower() in FILES:
        found = "a file" if there else "which is not there"
        raise (ValueError if there else FileNotFoundError)(
            f"{what} is {str(source)!r}, {found}, and has to be {takes}. Runs are scored by "
            "evaluate_run(read_run(file, collection), collection, name=...), Results.load(file) reads results"
        )
    try:
        if isinstance(source, Path):
            raise HFValidationError("there is no such folder")
        validate_repo_id(source)
    except HFValidationError as error:
        raise FileNotFoundError(f"{what} is {str(source)!r} and has to be {takes}: {error}") from error


def _told(name: str, revision: str) -> dict[str, str]:
    return {"name": name if "/" in name else f"local/{name}", "revision": revision}
