"""Low-rank adapters (LoRA) through peft: put them on, go on with them, merge them into plain weights.

What sentence-transformers and transformers leave open, and is closed here: an adapter that was loaded is frozen;
targets that match nothing are ignored as long as one matches; an adapter fits any base model of the same shape; a
merged model cannot be saved; and the head of a cross-encoder may be lost on the way to disk.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:
    from peft import LoraConfig

    from st_wkl.losses.scoring import Student

logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
# The rank that peft's guides start with; twice the rank as alpha keeps the size of the update when the rank changes.
RANK, DROPOUT = 16, 0.05
_SAMPLE = ["what does a reranker do", "A reranker scores a query and a document together."]
_TOLERANCE = 1e-5


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
    for name, module in _transformer(student).named_modules():
        if isinstance(module, nn.Linear) and (match := stacked.search(f".{name}")):
            found[match[1]] = None
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
    from peft import LoraConfig

    return LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        lora_dropout=DROPOUT,
        target_modules=default_targets(student),
        modules_to_save=_heads(student) or None,
    )


def check_config(student: Student, lora: bool | LoraConfig) -> None:
    """Stop where a name in the configuration matches no module; peft only does where no target matches at all.

    Raises:
        ValueError: With the names that match nothing, and the targets that there are.
    """
    config = default_config(student) if isinstance(lora, bool) else lora
    names = [name for name, _ in _transformer(student).named_modules()]
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
                f"The LoRA {what} {', '.join(missing)} match no module of {type(_transformer(student)).__name__}. "
                f"Those of its blocks are {', '.join(default_targets(student))}; lora=True takes them all."
            )


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


def prepare(student: Student, lora: bool | LoraConfig) -> dict[str, Any]:
    """Put an adapter on a student, or make the one that it carries trainable again.

    Args:
        student: The student, which is changed.
        lora: True for `default_config`, or a configuration of peft. A student that was loaded with an adapter goes on
            with it; its configuration must be this one, where one is given.

    Returns:
        What the record says: rank, alpha, targets, trainable weights and their share, and the base model's hash.

    Raises:
        ValueError: If the student is not made for adapters, targets match nothing, or it carries another adapter.

    Example:
        >>> prepare(SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2"), True)  # doctest: +SKIP
    """
    base = base_hash(student)
    if has_adapter(student):
        adapter = _adapter(student)
        if not isinstance(lora, bool):
            _check_same(adapter, lora)
        for name, parameter in _transformer(student).named_parameters():
            # Loading freezes all of it; what the adapter owns has to learn again.
            parameter.requires_grad_("lora_" in name or "modules_to_save" in name)
        adapter.inference_mode = False
        how = "continued"
    else:
        config = default_config(student) if isinstance(lora, bool) else copy.deepcopy(lora)
        check_config(student, config)
        student.add_adapter(config)
        adapter, how = _adapter(student), "new"
    trainable = sum(p.numel() for p in student.parameters() if p.requires_grad)
    total = sum(p.numel() for p in student.parameters())
    logger.info(
        "LoRA: %s of %s weights are trained (%.2f %%).", f"{trainable:,}", f"{total:,}", 100 * trainable / total
    )
    targets = adapter.target_modules
    return {
        "adapter": how,
        "rank": adapter.r,
        "alpha": adapter.lora_alpha,
        "dropout": adapter.lora_dropout,
        "targets": targets if isinstance(targets, str) else sorted(targets or []),
        "trainable": trainable,
        "share": round(trainable / total, 6),
        "base_revision": base,
    }


def base_hash(student: Student) -> str:
    """Return a hash of the weights below an adapter, the same with and without one.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.blake2b(digest_size=16)
    state = {
        name.replace(".base_layer", "").replace(".original_module", ""): tensor
        for name, tensor in _transformer(student).state_dict().items()
        if "lora_" not in name and "modules_to_save" not in name
    }
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name} {tensor.dtype} {tuple(state[name].shape)}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_reload(student: Student, folder: Path, *, trust_remote_code: bool = False) -> None:
    """Stop where a saved student does not say what the one in memory says.

    Raises:
        RuntimeError: If it does not, as with a cross-encoder whose new pooler no adapter carries.
    """
    from st_wkl.models import is_trusted, load_model

    trusted = is_trusted(student, trust_remote_code)
    difference = _difference(student, load_model(folder, trust_remote_code=trusted)[0])
    if difference > _TOLERANCE:
        raise RuntimeError(
            f"{folder} holds another model than was trained: the outputs differ by up to {difference:.2g}. An adapter "
            "carries no weights of its base model that were new when it was put on, as the pooler of a fresh "
            "cross-encoder. Save the base model first and train on from its folder, or train without lora."
        )


def merge(
    adapter: str | Path | Student,
    output: str | Path,
    *,
    base: str | Path | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Merge an adapter into its base model: a plain sentence-transformers folder, with the same embeddings to 1e-5.

    Args:
        adapter: Folder or Hub id of a student that was trained with `lora`, or such a student, which stays as it is.
        output: New folder. It appears under its name once it is complete and checked.
        base: Folder or Hub id that the adapter must belong to. None trusts the adapter's own word for it; if the
            student's record says which weights it was trained on, these are compared in any case.
        trust_remote_code: Run code of the models' repositories. Only for repositories that you have read.

    Returns:
        The folder.

    Raises:
        FileExistsError: If `output` holds something.
        ValueError: If there is no adapter, or its base model is another one than it was trained on.
        RuntimeError: If the merged model's outputs are not those of the adapter.

    Example:
        >>> merge("my-adapter", "my-student")  # doctest: +SKIP
    """
    from st_wkl.models import is_trusted, load_model
    from st_wkl.training.record import RECORD_FILE, TrainingRecord

    output = Path(output)
    if output.exists() and (output.is_file() or any(output.iterdir())):
        raise FileExistsError(f"{output} is not empty. Choose another folder, or delete it if it may go.")
    student: Any = load_model(adapter, trust_remote_code=trust_remote_code)[0]
    trusted = is_trusted(student, trust_remote_code)
    if not has_adapter(student):
        raise ValueError(f"{adapter} carries no adapter; it is merged already, or was trained without lora.")
    source = None if isinstance(adapter, nn.Module) else Path(adapter)
    record = TrainingRecord.load(source) if source is not None and (source / RECORD_FILE).is_file() else None
    check_base(student, record.lora if record else {}, base, trust_remote_code=trusted)
    merged = _merged(student)
    unfinished = output.with_name(f".{output.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        merged.save_pretrained(str(unfinished))
        difference = _difference(student, load_model(unfinished, trust_remote_code=trusted)[0])
        if difference > _TOLERANCE:
            raise RuntimeError(
                f"The merged model differs from the adapter's by up to {difference:.2g}; nothing is kept."
            )
        if record is not None and source is not None:
            _take_along(source, unfinished, record)
        if output.exists():
            output.rmdir()
        os.replace(unfinished, output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return output


def check_base(
    student: Student, trained: dict[str, Any], base: str | Path | None = None, *, trust_remote_code: bool = False
) -> None:
    """Stop where an adapter lies on other weights than it was trained on, which torch would not notice.

    Raises:
        ValueError: If it does.
    """
    from st_wkl.models import load_model

    found = base_hash(student)
    named = _adapter(student).base_model_name_or_path
    if trained.get("base_revision") not in (None, found):
        raise ValueError(
            f"The adapter was trained on other weights than those of {named}: the hash of the base model was "
            f"{trained['base_revision']} and is {found}. Bring back the base model of that time."
        )
    if base is not None and base_hash(load_model(base, trust_remote_code=trust_remote_code)[0]) != found:  # type: ignore[arg-type]
        raise ValueError(f"The adapter belongs to {named}, whose weights are not those of {base}.")


def _merged(student: Any) -> Any:
    """Return a copy of a student with its adapter merged, as a model that never had one."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    merged = copy.deepcopy(student)
    transformer: Any = _transformer(merged)
    for name, module in list(transformer.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            plain = module.get_base_layer()
        elif isinstance(module, ModulesToSaveWrapper):
            plain = module.modules_to_save[module.active_adapters[0]]
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(transformer.get_submodule(parent), child, plain)
    # Without these three, saving writes an adapter, or names with peft's prefix that load as random weights.
    transformer._hf_peft_config_loaded = False
    transformer._weight_conversions = None
    del transformer.peft_config
    for parameter in merged.parameters():
        parameter.requires_grad_(True)
    return merged


def _take_along(source: Path, target: Path, record: Any) -> None:
    """Bring the record, the card and the hashes of the training texts of an adapter into the merged folder."""
    from st_wkl.cards.model_card import write_model_card
    from st_wkl.data.exposure import EXPOSURE_FILE

    record.lora = {**record.lora, "merged": True}
    if (source / EXPOSURE_FILE).is_file():
        shutil.copyfile(source / EXPOSURE_FILE, target / EXPOSURE_FILE)
    write_model_card(target, record=record, results={})
    record.save(target)


def _difference(first: Any, second: Any) -> float:
    """Return the largest difference of two models' outputs on two texts."""
    outputs = []
    for model in (first, second):
        training = model.training
        model.eval()
        with torch.no_grad():
            if hasattr(model, "predict"):
                found = [model.predict([tuple(_SAMPLE)], activation_fn=nn.Identity(), show_progress_bar=False)]
            else:
                found = [model.encode([text], show_progress_bar=False, convert_to_tensor=False)[0] for text in _SAMPLE]
        outputs.append([np.asarray(value.to_dense().cpu() if hasattr(value, "to_dense") else value) for value in found])
        model.train(training)
    return max(float(np.abs(a.astype(float) - b.astype(float)).max()) for a, b in zip(*outputs, strict=True))


def _transformer(student: Any) -> nn.Module:
    model = getattr(student, "transformers_model", None)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{type(student).__name__} without a transformer, such as a static one, has nothing for LoRA to adapt: "
            "leave lora away, all its weights fit anywhere."
        )
    return model


def _adapter(student: Any) -> Any:
    return next(iter(student.transformers_model.peft_config.values()))


def _heads(student: Any) -> list[str]:
    """Return the classification head of a cross-encoder, which is outside of the blocks."""
    from sentence_transformers import CrossEncoder

    if not isinstance(student, CrossEncoder):
        return []
    return [name for name, _ in _transformer(student).named_children() if name in ("classifier", "score", "head")]


def _check_same(there: Any, asked: LoraConfig) -> None:
    told = {
        name: (getattr(there, name), getattr(asked, name))
        for name in ("r", "lora_alpha")
        if getattr(there, name) != getattr(asked, name)
    }
    if told:
        raise ValueError(
            "The student carries an adapter already, of another configuration ("
            + ", ".join(f"{name} {old} there, {new} asked for" for name, (old, new) in told.items())
            + "). Use lora=True to go on with it, or merge it first to put on a new one."
        )


def adapter_base(folder: str | Path) -> str | None:
    """Return the base model that a folder with an adapter names, None where there is no adapter."""
    path = Path(folder) / ADAPTER_CONFIG
    if not path.is_file():
        return None
    return json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
