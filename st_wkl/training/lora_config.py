"""What an adapter is asked to be: its default, which layers it goes on, and what cannot be trained here."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from peft import LoraConfig

    from st_wkl.losses.scoring import Student

# The rank that peft's guides start with; twice the rank as alpha keeps the size of the update when the rank changes.
RANK, DROPOUT = 16, 0.05
# Options of peft that need what no training here gives them; peft itself goes on without a word, or fails deep inside.
_REFUSED = {
    "alora_invocation_tokens": "switches the adapter on inside of texts that a causal model writes",
    "arrow_config": "routes between adapters that are trained already",
    "megatron_config": "is for models of Megatron",
    "monteclora_config": "needs a term of its own in the loss",
}
_REFUSED_STARTS = {
    "corda": "needs statistics of texts that were gathered before",
    "eva": "needs statistics of texts that were gathered before",
    "lora_ga": "needs gradients that were gathered before",
    "loftq": "needs a base model that is quantised",
}
# Where an adapter came from, and what decides only how it starts.
_NO_OPTIONS = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "init_lora_weights",
    "loftq_config",
    "peft_type",
    "peft_version",
    "revision",
    "runtime_config",
    "task_type",
}


def default_targets(student: Student) -> list[str]:
    """Return the linear layers inside the blocks of an encoder, all of them, as peft's `target_modules`.

    They are found by their place, not by a table of architectures: what is called `query`, `value` and `output.dense`
    in BERT is `Wqkv`, `Wo` and `Wi` in ModernBERT and `q_proj` to `down_proj` in Qwen. Embeddings, pooler and heads
    are outside of the blocks. All linear layers rather than queries and values alone, as QLoRA recommends
    (https://arxiv.org/abs/2305.14314).

    Raises:
        ValueError: If the student has no such layer, as a static one.
    """
    stacked = re.compile(r"\.\d+\.(.+)$")
    found: dict[str, None] = {}
    for name, module in transformer_of(student).named_modules():
        if isinstance(module, nn.Linear) and (match := stacked.search(f".{name}")):
            found[match[1]] = None
    if not found:
        raise ValueError(
            f"{type(transformer_of(student)).__name__} has no linear layers inside of blocks; name the layers to adapt "
            "with lora=LoraConfig(target_modules=…)."
        )
    return list(found)


def default_config(student: Student) -> LoraConfig:
    """Return the adapter that `lora=True` stands for: rank 16, alpha 32, dropout 0.05, on `default_targets`.

    The new head of a cross-encoder is trained and saved whole, as a random one cannot be adapted.
    """
    from peft import LoraConfig

    return LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        lora_dropout=DROPOUT,
        target_modules=default_targets(student),
        modules_to_save=heads(student) or None,
    )


def check_config(student: Student, lora: bool | LoraConfig) -> None:
    """Stop where a configuration asks for what cannot be trained here, or a name in it matches nothing.

    peft only stops where no target matches at all.

    Raises:
        TypeError: If it is no `LoraConfig`.
        ValueError: With the option that cannot work, or the names that match nothing and the targets that there are.
    """
    from peft import LoraConfig, PeftType

    config = default_config(student) if isinstance(lora, bool) else lora
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        raise TypeError(f"lora is True or a LoraConfig of peft, which has DoRA and others; got {_shown(config)}.")
    for option, reason in _REFUSED.items():
        if getattr(config, option, None):
            raise ValueError(f"LoRA's {option} {reason}: leave it away.")
    start = str(config.init_lora_weights)
    if start in _REFUSED_STARTS:
        raise ValueError(
            f"LoRA's init_lora_weights={start!r} {_REFUSED_STARTS[start]}: take True, 'pissa', 'olora' or another."
        )
    names = [name for name, _ in transformer_of(student).named_modules()]
    _check_places(config, transformer_of(student), names)
    for option in ("target_modules", "modules_to_save", "exclude_modules", "rank_pattern", "alpha_pattern"):
        wanted = getattr(config, option, None) or []
        if isinstance(wanted, str) and option == "modules_to_save":
            raise ValueError(f"LoRA's modules_to_save must be a list of names, got {wanted!r}: write [{wanted!r}].")
        if option == "target_modules" and wanted == "all-linear":
            continue
        patterns = [wanted] if isinstance(wanted, str) else sorted(wanted)
        regular = isinstance(wanted, str) or option.endswith("_pattern")
        if missing := [pattern for pattern in patterns if not _matches(pattern, names, option, regular)]:
            what = "targets" if option == "target_modules" else option
            raise ValueError(
                f"The LoRA {what} {', '.join(missing)} match no module of {type(transformer_of(student)).__name__}. "
                f"Those of its blocks are {', '.join(default_targets(student))}; lora=True takes them all."
            )


def _check_places(config: LoraConfig, transformer: Any, names: list[str]) -> None:
    """Stop where layers, parameters or tokens that are named do not exist."""
    layers = config.layers_to_transform if config.layers_to_transform is not None else []
    there = {int(part) for name in names for part in name.split(".") if part.isdigit()}
    if missing := sorted({layers} - there if isinstance(layers, int) else {*layers} - there):
        raise ValueError(f"LoRA's layers_to_transform {missing} do not exist; the layers are 0 to {max(there)}.")
    weights = [name for name, _ in transformer.named_parameters()]
    for wanted in config.target_parameters or []:
        if not any(name == wanted or name.endswith(f".{wanted}") for name in weights):
            raise ValueError(f"LoRA's target_parameters {wanted} is no parameter of {type(transformer).__name__}.")
    tokens: Any = config.trainable_token_indices or {}
    for place, indices in tokens.items() if isinstance(tokens, dict) else [(None, tokens)]:
        found = [transformer.get_input_embeddings()]
        if place is not None:
            found = [module for name, module in transformer.named_modules() if f".{name}".endswith(f".{place}")]
        if not found or not isinstance(found[0], nn.Embedding):
            raise ValueError(f"LoRA's trainable_token_indices name {place!r}, which is no table of embeddings.")
        if outside := [index for index in indices if not 0 <= index < found[0].num_embeddings]:
            raise ValueError(
                f"LoRA's trainable_token_indices {outside} do not exist; there are {found[0].num_embeddings:,} tokens."
            )


def options_of(config: LoraConfig) -> dict[str, Any]:
    """Return what a configuration asks for beyond rank, alpha, dropout and targets, in JSON values."""
    usual = {"r", "lora_alpha", "lora_dropout", "target_modules", *_NO_OPTIONS} - {"init_lora_weights"}
    found = {}
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        default = entry.default_factory() if callable(entry.default_factory) else entry.default
        if entry.name not in usual and value != default:
            found[entry.name] = _shown(value)
    return found


def _shown(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, dict):
        return {str(key): _shown(item) for key, item in value.items()}
    return sorted(map(_shown, value), key=str) if isinstance(value, set | list | tuple) else type(value).__name__


def _matches(pattern: str, names: list[str], option: str, regular: bool) -> bool:
    """Tell whether peft finds a module by a name or regular expression of one of its options."""
    if option == "modules_to_save":
        return any(name.endswith(pattern) for name in names)
    if regular:
        where = rf"(.*\.)?({pattern})" if option.endswith("_pattern") else pattern
        return any(re.fullmatch(where, name) for name in names)
    return any(name == pattern or name.endswith(f".{pattern}") for name in names)


def has_adapter(student: Student) -> bool:
    """Tell whether a student carries an adapter."""
    return bool(getattr(getattr(student, "transformers_model", None), "peft_config", None))


def transformer_of(student: Any) -> nn.Module:
    """Return the transformer inside of a student.

    Raises:
        ValueError: If there is none.
    """
    model = getattr(student, "transformers_model", None)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{type(student).__name__} without a transformer, such as a static one, has nothing for LoRA to adapt: "
            "leave lora away, all its weights fit anywhere."
        )
    return model


def adapter_of(student: Any) -> Any:
    """Return the configuration of the adapter that a student carries."""
    return next(iter(student.transformers_model.peft_config.values()))


def heads(student: Any) -> list[str]:
    """Return the classification head of a cross-encoder, which is outside of the blocks."""
    from sentence_transformers import CrossEncoder

    if not isinstance(student, CrossEncoder):
        return []
    return [name for name, _ in transformer_of(student).named_children() if name in ("classifier", "score", "head")]


def check_same(there: Any, asked: LoraConfig) -> None:
    """Stop where a student carries another adapter than the one that is asked for.

    Raises:
        ValueError: With the options that differ.
    """

    def options(config: Any) -> dict[str, Any]:
        found = {entry.name: getattr(config, entry.name) for entry in dataclasses.fields(config)}
        kept = {name: value for name, value in found.items() if name not in _NO_OPTIONS}
        return {name: set(value) if isinstance(value, list) else value for name, value in kept.items()}

    old, new = options(there), options(asked)
    told = [
        f"{name} {_shown(old.get(name))} there, {_shown(value)} asked for"
        for name, value in new.items()
        if value != old.get(name) and value != "all-linear" and not (not value and not old.get(name))
    ]
    if told:
        raise ValueError(
            f"The student carries an adapter already, of another configuration ({', '.join(told)}). Use lora=True to "
            "go on with it, or merge it first to put on a new one."
        )
