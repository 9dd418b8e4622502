"""Low-rank adapters (LoRA) through peft: put them on, go on with them, merge them into plain weights.

What sentence-transformers and transformers leave open, and is closed here: an adapter that was loaded is frozen;
targets that match nothing are ignored as long as one matches; an adapter fits any base model of the same shape; a
merged model cannot be saved; and the head of a cross-encoder may be lost on the way to disk.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import logging
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import LoraConfig, PeftType, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder
from torch import nn

from st_wkl.files import owned, replacing, replacing_folder
from st_wkl.models import check_one_transformer, is_trusted, load_model
from st_wkl.publish.model_card import headed, write_model_card
from st_wkl.record import EXPOSURE_FILE, RECORD_FILE, TrainingRecord
from st_wkl.training.students import name_of, named_dtype

if TYPE_CHECKING:
    from st_wkl.losses.scoring import Student

logger = logging.getLogger(__name__)

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
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "init_lora_weights", "loftq_config"),
    *("peft_type", "peft_version", "revision", "runtime_config", "task_type"),
}
_SAMPLE = ["what does a reranker do", "A reranker scores a query and a document together."]
TOLERANCE = 1e-5


def has_adapter(student: Student) -> bool:
    """Tell whether a student carries an adapter."""
    return bool(getattr(getattr(student, "transformers_model", None), "peft_config", None))


def _transformer(student: Any) -> Any:
    model = getattr(student, "transformers_model", None)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{type(student).__name__} without a transformer, such as a static one, has nothing for LoRA to adapt: "
            "leave lora away, all its weights fit anywhere."
        )
    return model


def _adapter_of(student: Any) -> Any:
    """Return the configuration of the adapter that a student carries."""
    return next(iter(student.transformers_model.peft_config.values()))


def _heads(student: Any) -> list[str]:
    """Return the classification head of a cross-encoder, which is outside of the blocks."""
    names = [name for name, _ in _transformer(student).named_children() if name in ("classifier", "score", "head")]
    return names if isinstance(student, CrossEncoder) else []


def default_targets(student: Student) -> list[str]:
    """Return the linear layers inside the blocks of an encoder, as peft's `target_modules`.

    They are found by their place, as each architecture has names of its own; embeddings, pooler and heads are outside
    of the blocks. All of them rather than queries and values alone, as QLoRA recommends
    (https://arxiv.org/abs/2305.14314).
    """
    linear = [name for name, module in _transformer(student).named_modules() if isinstance(module, nn.Linear)]
    found = dict.fromkeys(match[1] for name in linear if (match := re.search(r"\.\d+\.(.+)$", f".{name}")))
    if not found:
        raise ValueError(
            f"{type(_transformer(student)).__name__} has no linear layers inside of blocks; name the layers to adapt "
            "with lora=LoraConfig(target_modules=…)."
        )
    return list(found)


def default_config(student: Student) -> LoraConfig:
    """Return the adapter that `lora=True` stands for: rank 16, alpha 32, dropout 0.05, on `default_targets`.

    The new head of a cross-encoder is trained and saved whole, as a random one cannot be adapted.
    """
    return LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        lora_dropout=DROPOUT,
        target_modules=default_targets(student),
        modules_to_save=_heads(student) or None,
    )


def check_config(student: Student, lora: bool | LoraConfig) -> None:
    """Stop where an adapter cannot be trained here, or a name in it matches nothing; peft stops where none matches."""
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
    check_one_transformer(student, "an adapter")
    transformer = _transformer(student)
    _check_places(config, transformer)
    names = [name for name, _ in transformer.named_modules()]
    for option in ("target_modules", "modules_to_save", "exclude_modules", "rank_pattern", "alpha_pattern"):
        wanted = getattr(config, option, None) or []
        if isinstance(wanted, str) and option == "modules_to_save":
            raise ValueError(f"LoRA's modules_to_save must be a list of names, got {wanted!r}: write [{wanted!r}].")
        if option == "target_modules" and wanted == "all-linear":
            continue
        patterns = [wanted] if isinstance(wanted, str) else sorted(wanted)
        regular = isinstance(wanted, str) or option.endswith("_pattern")
        if missing := [pattern for pattern in patterns if not _matches(pattern, names, option, regular)]:
            raise ValueError(
                f"The LoRA {'targets' if option == 'target_modules' else option} {', '.join(missing)} match no module "
                f"of {type(transformer).__name__}. Those of its blocks are {', '.join(default_targets(student))}; "
                "lora=True takes them all."
            )


def _matches(pattern: str, names: list[str], option: str, regular: bool) -> bool:
    """Tell whether peft finds a module by a name or regular expression of one of its options."""
    if option == "modules_to_save":
        return any(name.endswith(pattern) for name in names)
    if regular:
        where = rf"(.*\.)?({pattern})" if option.endswith("_pattern") else pattern
        return any(re.fullmatch(where, name) for name in names)
    return any(f".{name}".endswith(f".{pattern}") for name in names)


def _check_places(config: LoraConfig, transformer: Any) -> None:
    """Stop where layers, parameters or tokens that are named do not exist."""
    modules = {f".{name}": module for name, module in transformer.named_modules()}
    weights = [f".{name}" for name, _ in transformer.named_parameters()]
    for wanted in config.target_parameters or []:
        if not any(name.endswith(f".{wanted}") for name in weights):
            raise ValueError(f"LoRA's target_parameters {wanted} is no parameter of {type(transformer).__name__}.")
    layers: Any = config.layers_to_transform if config.layers_to_transform is not None else []
    depth = max((int(part) + 1 for name in modules for part in name.split(".") if part.isdigit()), default=0)
    places = [("layers_to_transform", [layers] if isinstance(layers, int) else layers, depth, "layers")]
    tokens: Any = config.trainable_token_indices or {}
    for place, indices in tokens.items() if isinstance(tokens, dict) else [("", tokens)]:
        found = [module for name, module in modules.items() if name.endswith(f".{place}")]
        table = found[0] if place and found else None if place else transformer.get_input_embeddings()
        if not isinstance(table, nn.Embedding):
            raise ValueError(f"LoRA's trainable_token_indices name {place!r}, which is no table of embeddings.")
        places.append(("trainable_token_indices", indices, table.num_embeddings, "tokens"))
    for option, indices, count, what in places:
        if outside := [index for index in indices if not 0 <= index < count]:
            raise ValueError(f"LoRA's {option} {outside} do not exist; there are {count:,} {what}.")


def _shown(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, dict):
        return {str(key): _shown(item) for key, item in value.items()}
    return sorted(map(_shown, value), key=str) if isinstance(value, set | list | tuple) else type(value).__name__


def _options(config: Any, *others: str) -> dict[str, Any]:
    """Return what an adapter is asked to be: its fields but for those that say where it came from, and others."""
    found = {entry.name: getattr(config, entry.name) for entry in dataclasses.fields(config)}
    return {name: value for name, value in found.items() if name not in _NO_OPTIONS.union(others)}


def _unusual(config: Any) -> dict[str, Any]:
    """Return what a configuration asks for beyond rank, alpha, dropout and targets, in JSON values."""
    usual, plain = ("r", "lora_alpha", "lora_dropout", "target_modules"), LoraConfig()
    asked = {**_options(config, *usual), "init_lora_weights": config.init_lora_weights}
    return {name: _shown(value) for name, value in asked.items() if value != getattr(plain, name)}


def unusual_options(student: Student) -> str:
    """Name the options of a student's adapter that are not those of the default one."""
    usual = {"modules_to_save": _heads(student)}
    found = {name: value for name, value in _unusual(_adapter_of(student)).items() if value != usual.get(name)}
    return ", ".join(f"{name}={value!r}" for name, value in found.items())


def _check_same(there: Any, asked: LoraConfig) -> None:
    """Stop where a student carries another adapter than the one that is asked for."""
    old, new = _options(there), _options(asked)

    def plain(value: Any) -> Any:
        return set(value) if isinstance(value, list) else value or None

    told = [
        f"{name} {_shown(old.get(name))} there, {_shown(value)} asked for"
        for name, value in new.items()
        if value != "all-linear" and plain(value) != plain(old.get(name))
    ]
    if told:
        raise ValueError(
            f"The student carries an adapter already, of another configuration ({', '.join(told)}). Use lora=True to "
            "go on with it, or merge it first to put on a new one."
        )


def prepare(student: Student, lora: bool | LoraConfig) -> dict[str, Any]:
    """Put an adapter on a student, or make the one that it carries trainable again; return what the record says."""
    base, how = base_hash(student), "continued" if has_adapter(student) else "new"
    if how == "new":
        config = default_config(student) if isinstance(lora, bool) else copy.deepcopy(lora)
        check_config(student, config)
        student.add_adapter(config)
    else:
        if not isinstance(lora, bool):
            _check_same(_adapter_of(student), lora)
        unfreeze(student)
    adapter = _adapter_of(student)
    trainable = sum(weight.numel() for weight in student.parameters() if weight.requires_grad)
    total = sum(weight.numel() for weight in student.parameters())
    logger.info(
        "LoRA: %s of %s weights are trained (%.2f %%).", f"{trainable:,}", f"{total:,}", 100 * trainable / total
    )
    return {
        "adapter": how,
        "rank": adapter.r,
        "alpha": adapter.lora_alpha,
        "dropout": adapter.lora_dropout,
        "targets": _shown(adapter.target_modules or []),
        **({"options": options} if (options := _unusual(adapter)) else {}),
        "trainable": trainable,
        "share": round(trainable / total, 6),
        "base_revision": base,
    }


def unfreeze(student: Student) -> None:
    """Make trainable what belongs to the adapter, and nothing else of the transformer: loading freezes all of it."""
    transformer = _transformer(student)
    # By their memory: the names in an adapter's file are none of the parameters'.
    own = {weight.data_ptr() for weight in get_peft_model_state_dict(transformer, save_embedding_layers=False).values()}
    for parameter in transformer.parameters():
        parameter.requires_grad_(parameter.data_ptr() in own)
    _adapter_of(student).inference_mode = False


def base_hash(student: Student) -> str:
    """Return a hash of the weights below an adapter, the same with and without one, but for those made anew each time.

    They are read again where they came from: biases, norms or a part of the weights may belong to an adapter.
    """
    transformer = _transformer(student)
    source = _adapter_of(student).base_model_name_or_path if has_adapter(student) else transformer.name_or_path
    try:
        stored, info = type(transformer).from_pretrained(source, output_loading_info=True)
        state, fresh = stored.state_dict(), set(info["missing_keys"])
    except (OSError, ValueError):  # was made in memory
        fresh = set()
        state = {
            name.replace(".base_layer", "").replace(".original_module", ""): tensor
            for name, tensor in transformer.state_dict().items()
            if "lora_" not in name and "modules_to_save" not in name
        }
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(state.keys() - fresh):
        tensor = state[name].detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name} {tensor.dtype} {tuple(state[name].shape)}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_base(
    student: Student, trained: dict[str, Any], base: str | Path | None = None, *, trust_remote_code: bool = False
) -> None:
    """Stop where an adapter lies on other weights than it was trained on, which torch would not notice."""
    found, named = base_hash(student), _adapter_of(student).base_model_name_or_path
    if trained.get("base_revision") not in (None, found):
        raise ValueError(
            f"The adapter was trained on other weights than those of {named}: the hash of the base model was "
            f"{trained['base_revision']} and is {found}. Bring back the base model of that time."
        )
    if base is not None and base_hash(load_model(base, trust_remote_code=trust_remote_code)[0]) != found:  # type: ignore[arg-type]
        raise ValueError(f"The adapter belongs to {named}, whose weights are not those of {base}.")


def save(student: Student, folder: str | Path) -> None:
    """Save a student so that every loader finds its adapter again."""
    student.save_pretrained(str(folder))
    complete_names(Path(folder))


def complete_names(folder: Path) -> None:
    """Give DoRA's magnitudes the name by which transformers finds them, too; under peft's own they start anew."""
    path = folder / "adapter_model.safetensors"
    weights = load_file(path) if path.is_file() else {}
    if any(name.endswith("lora_magnitude_vector") for name in weights):
        renamed = {f"{n}.weight" if n.endswith("lora_magnitude_vector") else n: w for n, w in weights.items()}
        with replacing(path) as temporary:
            save_file(renamed, temporary, metadata={"format": "pt"})


def outputs(model: Any) -> list[np.ndarray]:
    """Return what a model says to two texts."""
    training = model.training
    model.eval()
    with torch.no_grad():
        if hasattr(model, "predict"):
            found = [model.predict([tuple(_SAMPLE)], activation_fn=nn.Identity(), show_progress_bar=False)]
        else:
            found = [model.encode([text], show_progress_bar=False)[0] for text in _SAMPLE]
    model.train(training)
    return [np.asarray(value.to_dense().cpu() if hasattr(value, "to_dense") else value, dtype=float) for value in found]


def difference(first: list[np.ndarray], second: list[np.ndarray]) -> float:
    """Return the largest difference of two models' outputs; NaN anywhere counts as infinite."""
    found = max(float(np.abs(a - b).max()) for a, b in zip(first, second, strict=True))
    return found if np.isfinite(found) else float("inf")


def merge(
    adapter: str | Path | Student,
    output: str | Path,
    *,
    base: str | Path | None = None,
    trust_remote_code: bool = False,
    save_dtype: str | torch.dtype | None = None,
) -> Path:
    """Merge an adapter into its base model: a plain sentence-transformers folder, with the same embeddings to 1e-5.

    Args:
        adapter: Folder or Hub id of a student that was trained with `lora`, or such a student, which stays as it is.
        output: New folder. It appears under its name once it is complete and checked.
        base: Folder or Hub id that the adapter must belong to. None trusts the adapter's own word for it; if the
            student's record says which weights it was trained on, these are compared in any case.
        trust_remote_code: Run code of the models' repositories. Only for repositories that you have read.
        save_dtype: Number type of the merged weights. Default: float32, which holds them as they were trained, whatever
            the base model is stored in; bfloat16 and float16 round them, after the comparison, to half the size.

    Returns:
        The folder.

    Raises:
        FileExistsError: If `output` holds something.
        ValueError: If there is no adapter, or its base model is another one than it was trained on.
        RuntimeError: If the merged model's outputs are not those of the adapter.

    Example:
        >>> merge("my-adapter", "my-student")  # doctest: +SKIP
    """
    output, dtype = Path(output).expanduser(), named_dtype(save_dtype or torch.float32)
    if output.exists() and (output.is_file() or any(output.iterdir())):
        raise FileExistsError(f"{output} is not empty. Choose another folder, or delete it if it may go.")
    # The sum of two weights in half precision is rounded; a model in memory stays as it is.
    model = copy.deepcopy(adapter).float() if isinstance(adapter, nn.Module) else adapter
    student: Any = load_model(model, trust_remote_code=trust_remote_code, dtype=torch.float32)[0]
    trusted = is_trusted(student, trust_remote_code)
    if not has_adapter(student):
        raise ValueError(f"{adapter} carries no adapter; it is merged already, or was trained without lora.")
    source = None if isinstance(adapter, nn.Module) else Path(adapter).expanduser()
    record = TrainingRecord.load(source) if source is not None and (source / RECORD_FILE).is_file() else None
    check_base(student, record.lora if record else {}, base, trust_remote_code=trusted)
    expected = outputs(student)
    merged = merged_in_place(student)
    told = headed(merged, record) if record is not None else nullcontext()
    with owned(output), replacing_folder(output) as unfinished, told:
        merged.save_pretrained(str(unfinished))
        again = load_model(unfinished, trust_remote_code=trusted)[0]
        if (found := difference(expected, outputs(again))) > TOLERANCE:
            raise RuntimeError(f"The merged model differs from the adapter's by up to {found:.2g}; nothing is kept.")
        if dtype is not torch.float32:
            merged.to(dtype).save_pretrained(str(unfinished))
        if record is not None and source is not None:
            if (source / EXPOSURE_FILE).is_file():
                shutil.copyfile(source / EXPOSURE_FILE, unfinished / EXPOSURE_FILE)
            record.precision = {**record.precision, "saved": name_of(dtype)}
            record.lora = {**record.lora, "merged": True}
            write_model_card(unfinished, record=record, results={})
            record.save(unfinished)
    return output


def merged_in_place(student: Any) -> Any:
    """Merge a student's adapter into its weights and return it, as a model that never had one."""
    transformer = _transformer(student)
    done: list[str] = []
    for name, module in list(transformer.named_modules()):
        if any(name.startswith(f"{parent}.") for parent in done):
            continue
        if isinstance(module, AuxiliaryTrainingWrapper):
            plain = module.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        elif isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            plain = module.get_base_layer()
        else:
            continue
        done.append(name)
        parent, _, child = name.rpartition(".")
        setattr(transformer.get_submodule(parent), child, plain)
    # Without these three, saving writes an adapter, or names with peft's prefix that load as random weights.
    transformer._hf_peft_config_loaded = False
    transformer._weight_conversions = None
    del transformer.peft_config
    for parameter in student.parameters():
        parameter.requires_grad_(True)
    return student
