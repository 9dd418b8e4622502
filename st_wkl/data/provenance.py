"""What a dataset can say of its own making, beside the counts: the call, and the teacher's licence."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from st_wkl._compat import card_text


def stated_license(model: str | os.PathLike[str]) -> str | None:
    """Return the licence that the card of a model states; None where there is no card or it states none.

    Args:
        model: Folder or Hub id.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from st_wkl.packaged import named

    model = named(str(model))[0]
    card = Path(model) / "README.md"
    if not Path(model).is_dir():
        try:
            card = Path(hf_hub_download(str(model), "README.md"))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
            return None  # a licence that nobody can look up is an unknown one, and no reason to lose the dataset
    return license_in(card.read_text(encoding="utf-8")) if card.is_file() else None


def licence_of(given: Any, loaded: Any) -> str:
    """Return what the card of a model states, `""` if nothing: of a folder or Hub id, or of one that is in memory."""
    source = given if isinstance(given, str | os.PathLike) else getattr(loaded.config, "name_or_path", None)
    return license_in(card_text(loaded)) or (stated_license(source) if source else None) or ""


def license_in(card: str) -> str | None:
    """Return the licence that the text of a card states, if any."""
    from huggingface_hub import ModelCard

    try:
        stated = ModelCard(card, ignore_metadata_errors=True).data.to_dict().get("license")
    except (ValueError, yaml.YAMLError):  # no front matter of a card, or a broken one
        return None
    return stated if isinstance(stated, str) else None


def python_call(collection: str, identity: Mapping[str, Any], options: Mapping[str, tuple[Any, Any]]) -> str:
    """Return the call that makes the dataset again, as far as it can be written down.

    Args:
        collection: Name of the collection.
        identity: The teacher's.
        options: Name to value and default; what has its default is left out.
    """
    teacher = repr(str(identity.get("model") or identity.get("kind") or "teacher"))
    if identity.get("kind") == "cross-encoder":
        told = f", model_kwargs={identity['model_kwargs']!r}" if "model_kwargs" in identity else ""
        teacher = f"CrossEncoderTeacher({teacher}, max_length={identity.get('max_length')}{told})"
    if identity.get("kind") == "remote":
        teacher = f"RemoteTeacher(url, {teacher}, api={identity.get('api')!r})"
    given = [f"{name}={value!r}" for name, (value, default) in options.items() if value != default]
    return f"DistillationDatasetBuilder({', '.join([repr(collection), teacher, *given])}).build()"
