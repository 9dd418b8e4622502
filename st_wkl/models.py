"""Which model is this: its class, its name, and the one identity that changes whenever its output can change.

Store, caches, results, cards and resuming all ask here.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.util import load_file_path

from st_wkl._versions import check_adapters
from st_wkl.files import read_json
from st_wkl.model_identity import (
    check_unchanged,
    hash_weights,
    identity,
    model_revision,
    model_state,
    own_code,
    own_hooks,
)
from st_wkl.packaged import named

AnyModel: TypeAlias = SentenceTransformer | SparseEncoder | MultiVectorEncoder | CrossEncoder
CLASSES = {kind.__name__: kind for kind in (SentenceTransformer, SparseEncoder, MultiVectorEncoder, CrossEncoder)}

__all__ = [
    "AnyModel",
    "check_one_transformer",
    "check_reloads",
    "hash_weights",
    "identity",
    "is_retriever",
    "is_trusted",
    "load_model",
    "model_name",
    "model_revision",
    "check_unchanged",
    "model_state",
    "own_hooks",
    "own_prompt",
    "saved_class",
    "saved_settings",
    "prompts_of",
    "set_prompts",
]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def load_model(
    model: AnyModel | str | Path, *, trust_remote_code: bool = False, dtype: torch.dtype | None = None
) -> tuple[AnyModel, str]:
    """Return a sentence-transformers model and its name.

    A folder or Hub id is loaded with the class that its `config_sentence_transformers.json` names; where it names none
    and there is no `modules.json`, a sequence classifier is loaded as a `CrossEncoder`; the rest as a
    `SentenceTransformer`.

    Args:
        model: One of the four model classes, a folder, a Hub id or a `packaged:` name.
        trust_remote_code: Run code of the model's folder or repository. Only for those that you have read.
        dtype: Number type to load a folder's or Hub id's weights in. Default: the one that they are stored in.

    Raises:
        TypeError: If `model` is none of these.
        ValueError: If it needs code of its own, which is not trusted.
        ImportError: If it is an adapter, and the installed transformers refuses the installed peft.
    """
    if isinstance(model, str | Path):
        source, name = named(str(model))
        check_adapters(load_file_path(source, "adapter_config.json"))
        options: Any = {} if dtype is None else {"model_kwargs": {"dtype": dtype}}
        loaded = CLASSES[saved_class(source)](source, trust_remote_code=trust_remote_code, **options)
        return loaded if dtype is None else loaded.to(dtype), name
    if isinstance(model, tuple(CLASSES.values())):
        return model, model_name(model)
    raise TypeError(f"model is a {type(model).__name__}; pass a folder, a Hub id or one of {', '.join(CLASSES)}")


def is_trusted(model: Any, trust_remote_code: bool = False) -> bool:
    """Return whether code of a model's own may run when it is loaded again: now, or when it was loaded first."""
    return trust_remote_code or bool(getattr(model, "trust_remote_code", False))


def check_reloads(model: Any, trust_remote_code: bool = False) -> None:
    """Refuse a model with code of its own that could not be loaded again after it is saved. Others always can.

    Raises:
        ValueError: If it is one; the message names the code.
    """
    own = [name for name, _ in own_code(type(module) for module in model.modules())]
    if not own:
        return
    with tempfile.TemporaryDirectory(prefix="st_wkl_") as folder:
        try:
            model.save_pretrained(folder)
            load_model(folder, trust_remote_code=is_trusted(model, trust_remote_code))
        except Exception as error:
            raise ValueError(
                f"The {type(model).__name__} has code of its own ({', '.join(own)}), and what is saved of it cannot be "
                f"loaded again: {str(error).strip()} Pass trust_remote_code=True if you have read that code, and keep "
                "classes of your own in a module that can be imported. Nothing was trained."
            ) from error


def model_name(model: AnyModel) -> str:
    """Return the Hub id or folder name that a model was loaded from, or its class name if it knows neither."""
    config = getattr(model, "config", None)
    card = model.model_card_data
    # A freshly trained model's card says "SentenceTransformer based on ..." where a name should be.
    names = [getattr(config, "name_or_path", None), card.base_model, card.model_id]
    for name in filter(None, names):
        if _HUB_ID.fullmatch(name) and not Path(name).exists():
            return str(name)
        return Path(name).name
    return type(model).__name__


def own_prompt(model: AnyModel, side: str = "query") -> str | None:
    """Return the prompt that a model puts before a text in use, as `encode_query`, `encode_document` and `predict` do.

    Args:
        model: The model.
        side: `"query"` or `"document"`. A cross-encoder has one prompt for both.

    Returns:
        The prompt, None where there is none.
    """
    # Some models have an empty prompt by this name, and then the default prompt does not count.
    name = _prompt_name(model, side, model.default_prompt_name)
    return model.prompts.get(name) or None if name is not None else None


def set_prompts(model: AnyModel, prompts: Mapping[str, str]) -> None:
    """Give a model the prompts by which its queries and documents are known from now on; they are saved with it.

    Args:
        model: The model, which is changed.
        prompts: By `"query"` and `"document"`; a cross-encoder has one, `"pair"`. A side that is not named stays.

    Raises:
        ValueError: If there is another key, or a prompt is no text.
    """
    sides = _sides(model)
    for side, prompt in prompts.items():
        if side not in sides or not isinstance(prompt, str):
            raise ValueError(
                f"The prompts of a {type(model).__name__} are texts by the names {', '.join(sides)}, got "
                f"{side!r}: {prompt!r}."
            )
        name = _prompt_name(model, side, side)
        if side == "pair":
            name = model.default_prompt_name = model.default_prompt_name or side
        model.prompts[name] = prompt


def prompts_of(model: AnyModel) -> dict[str, str]:
    """Return the prompts that a model is used with, by `"query"` and `"document"`, or `"pair"`; empty without any."""
    return {side: prompt for side in _sides(model) if (prompt := own_prompt(model, side))}


def _sides(model: AnyModel) -> tuple[str, ...]:
    return ("query", "document") if hasattr(model, "encode_query") else ("pair",)


def _prompt_name(model: AnyModel, side: str, otherwise: Any) -> Any:
    """Return the first of the names by which a model looks for the prompt of a side that it has."""
    names = ("document", "passage", "corpus") if side == "document" else ("query",)
    found = names if hasattr(model, "encode_query") else ()
    return next((name for name in found if name in model.prompts), otherwise)


def check_one_transformer(model: AnyModel, what: str) -> None:
    """Stop where a model has several transformers, of which a part of this package would see the first alone.

    Args:
        model: The model; a `Router` may have one for queries and one for documents.
        what: What it is that would do so.
    """
    found = {id(module.auto_model) for module in model.modules() if hasattr(module, "auto_model")}
    if len(found) > 1:
        raise ValueError(
            f"The {type(model).__name__} has {len(found)} transformers, such as one for queries and one for documents, "
            f"and {what} would take the first alone. Do it to each before they are put together."
        )


def is_retriever(source: str | os.PathLike[str]) -> bool:
    """Return whether a folder or Hub repository holds modules of sentence-transformers that are no cross-encoder's."""
    return load_file_path(str(source), "modules.json") is not None and saved_class(source) != "CrossEncoder"


def saved_class(source: str | os.PathLike[str]) -> str:
    """Return the name of the class that a folder or Hub repository was saved from.

    Raises:
        ValueError: A file of settings holds no JSON; the message names it.
    """
    if stated := saved_settings(source, "config_sentence_transformers.json").get("model_type"):
        return str(stated) if stated in CLASSES else "SentenceTransformer"
    if load_file_path(str(source), "modules.json"):  # a cross-encoder with modules states its class
        return "SentenceTransformer"
    architectures = saved_settings(source, "config.json").get("architectures") or []
    return "CrossEncoder" if any("SequenceClassification" in a for a in architectures) else "SentenceTransformer"


def saved_settings(source: str | os.PathLike[str], file: str) -> dict[str, Any]:
    """Return what a JSON file of a folder or Hub repository holds, nothing where it has none of this name."""
    path = load_file_path(str(source), file)
    return read_json(path) if path else {}
