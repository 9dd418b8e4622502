"""Is a loaded model fit for use: weights that were made at random, more tokens than it has places or embeddings for."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Router
from sentence_transformers.util import load_file_path
from transformers import PreTrainedModel
from transformers.utils import logging as upstream

from st_wkl._compat import commit_of
from st_wkl.files import read_json
from st_wkl.models import model_name
from st_wkl.ranges import NO_LIMIT

logger = logging.getLogger(__name__)

# Layers that are looked at one by one, each by a forward pass over one letter.
_ONE_BY_ONE = 64
# How the learned tables of positions are called; rotary and relative ones have none.
_POSITIONS = ("position_embeddings", "position_embedding", "embed_positions", "wpe")


def check_fits(model: Any, max_length: int | None = None) -> None:
    """Lower a model's length to the positions that it has, with one message, and refuse tokens that it does not know.

    RoBERTa and its kin count positions from the padding's id + 1: 514 rows are 512 places, of which their
    configuration says nothing, and the 513th token is an `IndexError` in the middle of the work.

    Args:
        model: One of the four model classes.
        max_length: Tokens that were asked for; None takes what the model says.

    Raises:
        ValueError: `max_length` is more than the model has, or its tokenizer has tokens without an embedding.
    """
    for module in model.modules():
        if getattr(module, "tokenizer", None) is not None and hasattr(module, "forward") and module is not model:
            _check_vocabulary(model, module)
    # The sides of a router have lengths of their own, of which it names the largest.
    router = next((module for module in model.children() if isinstance(module, Router)), None)
    for reader in [model] if router is None else [next(way.children()) for way in router.sub_modules.values()]:
        _check_length(model, reader, max_length)


def _check_length(model: Any, reader: Any, max_length: int | None) -> None:
    """Lower the length of a model, or of one side of it, to the positions that it has."""
    places = positions(reader)
    if places is None:
        return
    if max_length is not None and max_length > places:
        raise ValueError(f"max_length is {max_length:,}, but {_called(model)} has {places:,} positions. Lower it.")
    found = reader.max_seq_length
    if found is None or found > places:
        logger.warning(
            "%s reads %d tokens at most, the positions that it has: the length that it names (%s) would be an error "
            "at the first longer text.",
            _called(model),
            places,
            "none" if found is None or found > NO_LIMIT else found,
        )
        reader.max_seq_length = places
    for module in reader.modules():  # late interaction has a length of its own for each side
        for name in ("query_length", "document_length"):
            if isinstance(length := getattr(module, name, None), int) and length > places:
                logger.warning("%s: %s is lowered from %d to its %d positions.", _called(model), name, length, places)
                setattr(module, name, places)


def positions(model: Any) -> int | None:
    """Return how many tokens a model has learned positions for, None where it computes them."""
    found = []
    for module in model.modules():
        for name, child in module.named_children():
            if name in _POSITIONS and isinstance(child, torch.nn.Embedding):
                padding = getattr(module, "padding_idx", None) if name == "position_embeddings" else None
                # BART's and OPT's tables, as RoBERTa's, begin with rows that no token gets.
                offset = getattr(child, "offset", 0) if padding is None else padding + 1
                found.append(child.num_embeddings - offset)
    return min(found, default=None)


def _check_vocabulary(model: Any, module: Any) -> None:
    transformer = getattr(module, "auto_model", None)
    table = getattr(module, "embedding", None)
    if transformer is not None and hasattr(transformer, "get_input_embeddings"):
        table = transformer.get_input_embeddings()
    rows = getattr(table, "num_embeddings", None) if isinstance(table, torch.nn.Module) else None
    if rows is None or not hasattr(module.tokenizer, "get_vocab"):
        return
    beyond = sorted((number, token) for token, number in module.tokenizer.get_vocab().items() if number >= rows)
    if beyond:
        raise ValueError(
            f"The tokenizer of {_called(model)} has {len(beyond):,} tokens without an embedding, the first is "
            f"{beyond[0][1]!r} (id {beyond[0][0]:,}; the table has {rows:,} rows): the first text with one would be an "
            "IndexError. Take the tokenizer that belongs to the model, or resize the table with "
            "transformers_model.resize_token_embeddings and train it."
        )


def check_complete(model: Any, role: str) -> None:
    """Refuse a model that answers with weights which were in no file, so that its answers are random.

    Weights that decide nothing, such as an unused pooler, may be missing; so may those that were trained since.

    Args:
        model: One of the four model classes, as it was loaded.
        role: What it is for, for the message, such as `"teacher"`.

    Raises:
        ValueError: The message names the missing weights.
    """
    check_fits(model)
    if missing := random_weights(model):
        raise ValueError(
            f"{_called(model)} cannot be a {role}: {_listed(missing)} in no file that it was loaded from, so "
            f"{type(model).__name__} made them at random, and what they answer is random. Give a model that was "
            f"trained as a {type(model).__name__}; one that you trained in memory, save and give its folder."
        )


def check_student(model: Any) -> None:
    """Say once which new weights a student starts with, and refuse one whose encoder itself was made at random.

    Raises:
        ValueError: The message names the missing weights.
    """
    check_fits(model)
    missing = random_weights(model)
    if body := [name for name in missing if not _of_head(model, name)]:
        raise ValueError(
            f"{_called(model)} cannot be a student: {_listed(body)} of the encoder in no file that it was loaded from, "
            "so they were made at random, and nothing would be left of what the base model knows. Check that the "
            "folder or repository is that of the model, and complete."
        )
    say_new(model, missing)


def say_new(model: Any, missing: list[str] | None = None) -> None:
    """Say which weights of a model are new, as on purpose in a student that has yet to be trained."""
    check_fits(model)
    missing = random_weights(model) if missing is None else missing
    if missing:
        logger.warning(
            "%s starts with a new head: %s in no file that it was loaded from. Before training, its scores are random.",
            _called(model),
            _listed(missing),
        )


def random_weights(model: Any) -> list[str]:
    """Return the names of weights that were made at random when a model was loaded, and that its output depends on."""
    try:
        missing, source = _missing(model)
        if not missing or _was_trained(model, missing, source):
            return []
        list(_outputs(model))  # what fails in any case says nothing about the weights
    except Exception as error:  # whatever a model of unknown make breaks: it may well be sound
        logger.info("Whether %s is complete could not be told: %s: %s", _called(model), type(error).__name__, error)
        return []
    if not _decide(model, list(missing.values())):
        return []
    layers: dict[str, list[str]] = {}
    for name in missing:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    if len(layers) > _ONE_BY_ONE:
        return sorted(missing)
    used = [names for names in layers.values() if _decide(model, [missing[name] for name in names])]
    return sorted(name for names in used for name in names)


def _missing(model: Any) -> tuple[dict[str, Any], Any]:
    """Return the parameters by name that were in no file, and how its transformer is loaded once more."""
    transformer = model.transformers_model
    if not isinstance(transformer, PreTrainedModel) or not transformer.config.name_or_path:
        return {}, None
    root = transformer.config.name_or_path
    listed = _modules_of(root)
    places = [entry.get("path", "") for entry in listed if str(entry.get("type", "")).endswith("Transformer")]

    def load(**options: Any) -> Any:
        return type(transformer).from_pretrained(
            root,
            config=copy.deepcopy(transformer.config),
            subfolder=places[0] if places else "",
            revision=commit_of(transformer.config) or "main",
            local_files_only=True,
            **options,
        )

    with _aside():
        _, told = load(device_map="meta", output_loading_info=True)
    names = set(told["missing_keys"]) | {key[0] for key in told["mismatched_keys"]}
    values = {_plain_name(name): value for name, value in transformer.named_parameters()}
    found = {name: values[name] for name in names if name in values}
    known = {str(entry.get("type", "")).rpartition(".")[2] for entry in listed}
    if "HF_ColBERT" not in (transformer.config.architectures or []):  # its projection lies beside the encoder
        for place, module in list(model.named_children())[1:]:
            if type(module).__name__ not in known:
                found |= {f"{place}.{name}": value for name, value in module.named_parameters()}
    return found, load


def _was_trained(model: Any, missing: dict[str, Any], load: Any) -> bool:
    """Return whether a model was trained since it was loaded: its weights are others, or its new biases not 0."""
    biases = [value for name, value in missing.items() if name.endswith("bias")]
    if any(bool(value.any()) for value in biases):
        return True
    if any("lora_B" in name and bool(value.any()) for name, value in model.named_parameters()):
        return True
    with _aside():
        there = dict(load(dtype=next(model.parameters()).dtype).named_parameters())
    return any(
        not torch.equal(value.detach().cpu(), there[_plain_name(name)])
        for name, value in model.transformers_model.named_parameters()
        if _plain_name(name) in there and _plain_name(name) not in missing
    )


def _decide(model: Any, values: list[Any]) -> bool:
    """Return whether the output depends on weights, by what becomes of it where they are not a number."""
    kept = [value.detach().clone() for value in values]
    try:
        for value in values:
            value.data.fill_(torch.nan)
        return not all(bool(torch.isfinite(output).all()) for output in _outputs(model))
    except Exception:  # an output that cannot be made without them
        return True
    finally:
        for value, before in zip(values, kept, strict=True):
            value.data.copy_(before)


def _outputs(model: Any) -> Iterator[Any]:
    if hasattr(model, "predict"):
        yield torch.as_tensor(model.predict([("a", "b")], activation_fn=torch.nn.Identity(), show_progress_bar=False))
        return
    dense = {} if isinstance(model, MultiVectorEncoder) else {"convert_to_tensor": True}
    for encode in (model.encode_query, model.encode_document):
        output = encode(["a"], show_progress_bar=False, **dense)[0]
        yield output.to_dense() if output.is_sparse else output


def _of_head(model: Any, name: str) -> bool:
    """Return whether a weight is outside of the encoder, as a classifier and a projection are, and their pooler."""
    transformer = model.transformers_model
    if name[0].isdigit() or (hasattr(model, "predict") and "pooler" in name):
        return True
    return transformer.base_model is not transformer and not name.startswith(f"{transformer.base_model_prefix}.")


def _modules_of(root: str) -> list[dict[str, Any]]:
    path = load_file_path(root, "modules.json", local_files_only=True)
    return read_json(path) if path else []


def _plain_name(name: str) -> str:
    """Return the name that a weight has without an adapter around it."""
    return name.replace(".base_layer", "").replace(".original_module", "")


@contextmanager
def _aside() -> Iterator[None]:
    """Load once more without a word, and without moving the random numbers of what comes after."""
    level, bars = upstream.get_verbosity(), upstream.is_progress_bar_enabled()
    upstream.set_verbosity_error()
    upstream.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        upstream.set_verbosity(level)
        if bars:
            upstream.enable_progress_bar()


def _called(model: Any) -> str:
    return f"{type(model).__name__} {model_name(model)!r}"


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return f"{shown} {'are' if len(names) > 1 else 'is'}"
