"""Which model is this: its class, its name, and the one identity that changes whenever its output can change.

Store, caches, results, cards and resuming all ask here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import torch
    from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder

    AnyModel: TypeAlias = SentenceTransformer | SparseEncoder | MultiVectorEncoder | CrossEncoder

# Entries of the configurations of transformers, peft and the modules that say where a model came from and whether it is
# being trained, not what it computes, or that repeat what the weights say and are filled in late.
_NO_SETTINGS = {
    "_name_or_path",
    "architectures",
    "base_model_name_or_path",
    "dtype",
    "embedding_dimension",
    "inference_mode",
    "revision",
    "torch_dtype",
    "transformers_version",
}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def load_model(model: AnyModel | str | Path) -> tuple[AnyModel, str]:
    """Return a sentence-transformers model and its name.

    A folder or Hub id is loaded with the class that its `config_sentence_transformers.json` names; without that file, a
    sequence classifier is loaded as a `CrossEncoder` and everything else as a `SentenceTransformer`.

    Args:
        model: One of the four model classes, a folder or a Hub id.

    Raises:
        TypeError: If `model` is none of these.
    """
    import sentence_transformers

    classes = {
        name: getattr(sentence_transformers, name)
        for name in ("SentenceTransformer", "SparseEncoder", "MultiVectorEncoder", "CrossEncoder")
    }
    if isinstance(model, str | Path):
        source = str(model)
        folder = Path(source)
        name = folder.resolve().name if folder.exists() else source
        return classes[_saved_class(source, set(classes))](source), name
    if isinstance(model, tuple(classes.values())):
        return model, model_name(model)
    raise TypeError(f"model is a {type(model).__name__}; pass a folder, a Hub id or one of {', '.join(classes)}")


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


def model_revision(model: AnyModel) -> str:
    """Return a hash of everything that decides the model's output: weights, modules, tokenizer, prompts, lengths.

    It is the same after saving and loading, on every device, and different after a single weight has changed.

    Returns:
        40 hexadecimal digits (BLAKE2b), as long as a commit.

    Raises:
        ValueError: If the weights are not in torch's hands, as with the onnx backend, or not loaded.
    """
    if not model.state_dict():
        raise ValueError(
            f"{type(model).__name__} has no torch weights to hash (backend {getattr(model, 'backend', None)!r}); "
            "pass revision= so that its results are not taken for another model's"
        )
    digest = hashlib.blake2b(digest_size=20)
    digest.update(json.dumps(_settings(model), sort_keys=True).encode())
    add_weights(digest, model)
    return digest.hexdigest()


def add_weights(digest: hashlib.blake2b, model: torch.nn.Module) -> None:
    """Add name, type, shape and bytes of every weight to a hash, whatever file, device and order they came in.

    Raises:
        ValueError: A weight is not loaded.
    """
    import torch

    for name, tensor in sorted(model.state_dict().items()):
        if tensor.is_meta:
            raise ValueError(f"the weight {name!r} is not loaded (it lies on the meta device); load the model first")
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def hash_weights(model: torch.nn.Module) -> str:
    """Return a hash of a model's weights alone, 32 hexadecimal digits; settings have to be named beside it.

    Raises:
        ValueError: A weight is not loaded.
    """
    digest = hashlib.blake2b(digest_size=16)
    add_weights(digest, model)
    return digest.hexdigest()


def _saved_class(source: str, known: set[str]) -> str:
    """Return the name of the class that a folder or Hub repository was saved from."""
    from sentence_transformers.util import load_file_path

    def read(file: str) -> dict[str, Any] | None:
        path = load_file_path(source, file)
        return json.loads(Path(path).read_text(encoding="utf-8")) if path else None

    if settings := read("config_sentence_transformers.json"):
        saved = settings.get("model_type", "SentenceTransformer")
        return saved if saved in known else "SentenceTransformer"
    architectures = (read("config.json") or {}).get("architectures") or []
    return "CrossEncoder" if any("SequenceClassification" in a for a in architectures) else "SentenceTransformer"


def _settings(model: Any) -> Any:
    """Return what decides the output besides the weights, as plain JSON values."""
    config, transformer = model.config, model.transformers_model
    adapters = getattr(transformer, "peft_config", None) or {}
    return _plain(
        {
            "class": type(model).__name__,
            "prompts": {name: prompt for name, prompt in model.prompts.items() if prompt},
            "default_prompt": model.default_prompt_name,
            "max_seq_length": model.get_max_seq_length(),
            "similarity": getattr(model, "similarity_fn_name", None),
            "truncate_dim": getattr(model, "truncate_dim", None),
            "activation": type(getattr(model, "activation_fn", None)).__name__,
            "modules": [
                [name, type(module).__name__, module.get_config_dict() if hasattr(module, "get_config_dict") else None]
                for name, module in model.named_children()
            ],
            "transformer": type(transformer).__name__,
            "config": config.to_diff_dict() if hasattr(config, "to_diff_dict") else None,
            "adapters": {name: adapter.to_dict() for name, adapter in adapters.items()},
            "adapter_layers": [
                [name, layer.disable_adapters, layer.active_adapters, getattr(layer, "scaling", None)]
                for name, layer in model.named_modules()
                if isinstance(getattr(layer, "disable_adapters", None), bool)
            ],
            "tokenizer": _tokenizer_settings(getattr(model[0], "tokenizer", None)),
        }
    )


def _tokenizer_settings(tokenizer: Any) -> Any:
    """Return the tokenizer's definition without truncation and padding, which every call sets anew."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(backend, "to_str"):
        return type(tokenizer).__name__
    definition = json.loads(backend.to_str())
    return {key: value for key, value in definition.items() if key not in ("truncation", "padding")}


def _plain(value: Any) -> Any:
    """Return `value` as JSON values that are equal whenever the settings are, whatever their container's order."""
    if value is None or isinstance(value, (bool, int, str)):  # first, as most of it is a tokenizer's vocabulary
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if key not in _NO_SETTINGS}
    if isinstance(value, set | frozenset):
        return sorted(str(item) for item in value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value)
