"""The one identity of a model: a hash of everything that decides its output, equal wherever it is loaded."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.dynamic_module_utils import get_relative_import_files

from st_wkl._compat import hooks_of, version_of
from st_wkl.files import content_hash
from st_wkl.model_files import hash_files

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
_STANDARD_LIBRARY = Path(sys.modules["json"].__file__ or "").resolve().parents[1]


def model_revision(model: Any) -> str:
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
    return _hash_weights(model, hashlib.blake2b(json.dumps(_settings(model), sort_keys=True).encode(), digest_size=20))


def identity(model: torch.nn.Module) -> dict[str, str]:
    """Return the one identity of a loaded model, everything that decides its output.

    Returns:
        `weights`, the hash of them alone, and `settings`, that of all else: adapters and whether they are on,
        configuration, modules, tokenizers, prompts, lengths, activation, code of the model's own.

    Raises:
        ValueError: A weight is not loaded.
    """
    return {"weights": hash_weights(model), "settings": content_hash(_settings(model), size=16)}


def own_hooks(model: torch.nn.Module) -> list[str]:
    """Return the names of forward hooks that no package has registered: code of somebody's own that changes outputs."""
    found = []
    for name, module in model.named_modules():
        for hook in hooks_of(module):
            hook = getattr(hook, "func", hook)
            home = getattr(hook, "__module__", None) or type(hook).__module__
            file = getattr(sys.modules.get(home), "__file__", None)
            if file is None or not _is_installed(home, file):
                found.append(f"{name}: {getattr(hook, '__qualname__', type(hook).__qualname__)}")
    return found


def check_unchanged(model: Any, state: Any, teacher: str, made: str) -> None:
    """Stop where a teacher's model in memory is no longer the one whose identity what it makes goes by."""
    if model_state(model) != state:
        raise ValueError(
            f"The model was changed after it became a teacher, so its {made} belong under another identity. Make a "
            f"new {teacher} of it."
        )


def model_state(model: Any) -> Any:
    """Return what shows at little cost whether a model in memory is still the one whose identity was asked for."""
    tokenizer: Any = getattr(model[0], "tokenizer", None)
    return [
        [(name, id(value), value.dtype, version_of(value)) for name, value in model.named_parameters()],
        _adapter_layers(model),
        [(id(module), *map(id, hooks_of(module))) for module in model.modules()],
        [dict(model.prompts), model.default_prompt_name, model.get_max_seq_length()],
        [id(tokenizer), len(tokenizer) if hasattr(tokenizer, "__len__") else None],
    ]


def hash_weights(model: torch.nn.Module) -> str:
    """Return a hash of a model's weights alone, 32 hexadecimal digits; settings have to be named beside it.

    Raises:
        ValueError: A weight is not loaded.
    """
    return _hash_weights(model, hashlib.blake2b(digest_size=16))


def _hash_weights(model: torch.nn.Module, digest: hashlib.blake2b) -> str:
    """Add name, type, shape and bytes of every weight to a hash, whatever file, device and order they came in."""
    for name, value in sorted(model.state_dict().items()):
        _add(digest, name, value)
    return digest.hexdigest()


def _add(digest: hashlib.blake2b, name: str, value: Any) -> None:
    """Add one entry of a state dict; modules that were quantised by torch hold other things than plain tensors."""
    if isinstance(value, list | tuple):
        for place, part in enumerate(value):
            _add(digest, f"{name}.{place}", part)
    elif not isinstance(value, torch.Tensor):
        digest.update(f"{name} {value}\n".encode())
    elif value.is_meta:
        raise ValueError(f"the weight {name!r} is not loaded (it lies on the meta device); load the model first")
    elif value.is_quantized:
        per_tensor = value.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric)
        told = (value.q_scale(), value.q_zero_point()) if per_tensor else (value.q_per_channel_axis(),)
        digest.update(f"{name} {value.dtype} {told}\n".encode())
        scales = () if per_tensor else (value.q_per_channel_scales(), value.q_per_channel_zero_points())
        _add(digest, name, [value.int_repr(), *scales])
    elif hasattr(value, "__tensor_flatten__"):  # a tensor that is made of others, as torchao's
        names, context = value.__tensor_flatten__()
        digest.update(f"{name} {type(value).__name__} {context}\n".encode())
        _add(digest, name, [getattr(value, part) for part in names])
    else:
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _settings(model: Any) -> Any:
    """Return what decides the output besides the weights, as plain JSON values."""
    config, transformer = model.config, model.transformers_model
    adapters = getattr(transformer, "peft_config", None) or {}
    settings = _plain(
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
            "adapter_layers": _adapter_layers(model),
            "tokenizer": _tokenizer_settings(getattr(model[0], "tokenizer", None)),
        }
    )
    return settings | _unusual(model)


def _adapter_layers(model: Any) -> list[Any]:
    return [
        [name, layer.disable_adapters, list(layer.active_adapters), dict(getattr(layer, "scaling", None) or {}) or None]
        for name, layer in model.named_modules()
        if isinstance(getattr(layer, "disable_adapters", None), bool)
    ]


def _unusual(model: Any) -> dict[str, Any]:
    """Return what most models have at its default. Only what differs is named, so that the others' hashes stay."""
    activation = getattr(model, "activation_fn", None)
    children = {id(module) for module in model.children()}
    modules = [
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, "get_config_dict") or id(module) in children
    ]
    found = {
        "activation_options": None if activation is None else _function(activation),
        "forward": {name: kwargs for name, kwargs in (getattr(model, "module_kwargs", None) or {}).items() if kwargs},
        "float32": getattr(model, "keep_in_fp32_modules", None),
        "prompts_named_as_settings": [
            [name, prompt] for name, prompt in model.prompts.items() if prompt and name in _NO_SETTINGS
        ],
        # Such as the routes of a Router, which the list of modules names as one.
        "inner_modules": [
            [name, type(module).__name__, module.get_config_dict(), getattr(module, "max_seq_length", None)]
            for name, module in modules
            if id(module) not in children
        ],
        "further_transformers": [
            [name, module.auto_model.config.to_diff_dict()]
            for name, module in modules
            if hasattr(module, "auto_model") and module.auto_model is not model.transformers_model
        ],
        "attributes": [[name, _public(module)] for name, module in modules if not hasattr(module, "get_config_dict")],
        "tokenizers": [
            [name, *told] for name, module in modules if (told := _unusual_tokenizer(module, first=module is model[0]))
        ],
        "hooks": own_hooks(model),
        "code": own_code(type(module) for module in model.modules()),
    }
    return {name: _plain(value) for name, value in found.items() if value not in (None, [], {}, "")}


def _unusual_tokenizer(module: Any, *, first: bool) -> list[Any]:
    """Return what the definition of a module's tokenizer leaves open; for other modules than the first that, too."""
    tokenizer, processor = getattr(module, "tokenizer", None), getattr(module, "processor", None)
    if tokenizer is None:
        return []
    kind, definition = type(tokenizer), _tokenizer_settings(tokenizer)
    found: dict[str, Any] = {
        name: value
        for name in ("padding_side", "truncation_side", "model_input_names", "split_special_tokens", "chat_template")
        if (value := getattr(tokenizer, name, None)) not in (getattr(kind, name, None), None, False)
    }
    # A tokenizer of transformers gets both anew with every call; a static model's has them for good.
    if not hasattr(tokenizer, "backend_tokenizer") and (
        getattr(tokenizer, "truncation", None) or getattr(tokenizer, "padding", None)
    ):
        found["lengths"] = [tokenizer.truncation, tokenizer.padding]
    if getattr(module, "query_expansion", None):
        found["mask_token"] = getattr(tokenizer, "mask_token", None)
        if found["mask_token"] == "[MASK]":
            del found["mask_token"]
    if not isinstance(definition, dict):
        found["files"] = _saved_tokenizer(tokenizer)
    elif len(hidden := _tokens_named_as_settings(definition)) > 1:  # of one alone, the others leave but one id
        found["tokens"] = hidden
    if processor is not None and processor is not tokenizer and hasattr(processor, "to_dict"):
        found["processor"] = [processor.to_dict(), getattr(processor, "chat_template", None)]
    return [found, None if first else definition] if found or not first else []


def _tokens_named_as_settings(definition: Mapping[str, Any]) -> list[Any]:
    vocabulary = (definition.get("model") or {}).get("vocab")
    if not isinstance(vocabulary, Mapping):
        return []
    return [[token, vocabulary[token]] for token in sorted(_NO_SETTINGS & vocabulary.keys())]


def _saved_tokenizer(tokenizer: Any) -> str:
    """Return a hash of what a tokenizer without one definition, one that is written in Python, saves of itself."""
    save = getattr(tokenizer, "save_pretrained", None) or getattr(tokenizer, "save", None)
    if save is None:
        return str(type(tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        files = sorted(file for file in Path(folder).rglob("*") if file.is_file())
        return hash_files(Path(folder), files)


def _function(function: Any) -> Any:
    """Return what an activation computes beyond the name of its class, None if that says it all."""
    if isinstance(function, torch.nn.Module):
        told = [] if repr(function) == f"{type(function).__name__}()" else [repr(function)]
        told += [hash_weights(function)] if function.state_dict() else []
        return [*told, *own_code({type(inner) for inner in function.modules()})] or None
    code = getattr(function, "__code__", None)
    named = [getattr(function, "__module__", ""), getattr(function, "__qualname__", repr(type(function)))]
    return [*named, code and [code.co_code.hex(), [c for c in code.co_consts if isinstance(c, int | float | str)]]]


def own_code(classes: Iterable[type]) -> list[Any]:
    """Return name and hash of the code that classes bring along: a repository's files, or a class of a script."""
    found = {}
    for cls in {ancestor for given in classes for ancestor in given.__mro__}:
        file = getattr(sys.modules.get(cls.__module__), "__file__", None)
        if file is None or _is_installed(cls.__module__, file):
            continue
        if cls.__module__.startswith("transformers_modules."):
            for used in {file, *get_relative_import_files(file)}:
                found[Path(used).name] = hash_files(Path(used).parent, [Path(used)])
            continue
        try:  # not the file: a script changes all the time
            found[cls.__qualname__] = hashlib.blake2b(inspect.getsource(cls).encode(), digest_size=16).hexdigest()
        except (OSError, TypeError):
            found[cls.__qualname__] = ""
    return sorted(found.items())


def _is_installed(module: str, file: str) -> bool:
    """Return whether code is Python's or a package's, whose version is no part of a model."""
    path = Path(file).resolve()
    return (
        module.partition(".")[0] in ("torch", "transformers", "sentence_transformers", "peft")
        or not {"site-packages", "dist-packages"}.isdisjoint(path.parts)
        or path.is_relative_to(_STANDARD_LIBRARY)
    )


def _public(module: Any) -> dict[str, Any]:
    """Return the plain attributes of a module that does not say by itself what it was made from."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training" and isinstance(value, bool | int | float | str)
    }


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
