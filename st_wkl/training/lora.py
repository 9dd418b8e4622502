"""Low-rank adapters (LoRA) through peft: put them on, go on with them, merge them into plain weights.

What sentence-transformers and transformers leave open, and is closed here: an adapter that was loaded is frozen;
targets that match nothing are ignored as long as one matches; an adapter fits any base model of the same shape; a
merged model cannot be saved; and the head of a cross-encoder may be lost on the way to disk.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from st_wkl.files import owned, replacing, replacing_folder
from st_wkl.training.lora_config import (
    adapter_of,
    check_config,
    check_same,
    default_config,
    default_targets,
    has_adapter,
    options_of,
    transformer_of,
)
from st_wkl.training.precision import name_of, named_dtype

if TYPE_CHECKING:
    from peft import LoraConfig

    from st_wkl.losses.scoring import Student

__all__ = [
    "base_hash",
    "check_config",
    "default_config",
    "default_targets",
    "has_adapter",
    "merge",
    "prepare",
]

logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
_SAMPLE = ["what does a reranker do", "A reranker scores a query and a document together."]
TOLERANCE = 1e-5


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
        adapter = adapter_of(student)
        if not isinstance(lora, bool):
            check_same(adapter, lora)
        unfreeze(student)
        how = "continued"
    else:
        config = default_config(student) if isinstance(lora, bool) else copy.deepcopy(lora)
        check_config(student, config)
        student.add_adapter(config)
        adapter, how = adapter_of(student), "new"
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
        **({"options": options} if (options := options_of(adapter)) else {}),
        "trainable": trainable,
        "share": round(trainable / total, 6),
        "base_revision": base,
    }


def unfreeze(student: Student) -> None:
    """Make trainable what belongs to the adapter, and nothing else of the transformer: loading freezes all of it."""
    from peft import get_peft_model_state_dict

    transformer = transformer_of(student)
    # By their memory: the names in an adapter's file are none of the parameters'.
    own = {weight.data_ptr() for weight in get_peft_model_state_dict(transformer, save_embedding_layers=False).values()}
    for parameter in transformer.parameters():
        parameter.requires_grad_(parameter.data_ptr() in own)
    adapter_of(student).inference_mode = False


def base_hash(student: Student) -> str:
    """Return a hash of the weights below an adapter, the same with and without one, as they are stored.

    They are read again where they came from: biases, norms or a part of the weights may belong to an adapter. Weights
    that are made anew at each loading do not count.

    Returns:
        32 hexadecimal digits.
    """
    transformer: Any = transformer_of(student)
    source = adapter_of(student).base_model_name_or_path if has_adapter(student) else transformer.name_or_path
    state, fresh = transformer.state_dict(), set()
    try:
        stored, info = type(transformer).from_pretrained(source, output_loading_info=True)
        state, fresh = stored.state_dict(), set(info["missing_keys"])
    except (OSError, ValueError):  # was made in memory
        state = {
            name.replace(".base_layer", "").replace(".original_module", ""): tensor
            for name, tensor in state.items()
            if "lora_" not in name and "modules_to_save" not in name
        }
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(state.keys() - fresh):
        tensor = state[name].detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name} {tensor.dtype} {tuple(state[name].shape)}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save(student: Student, folder: str | Path) -> None:
    """Save a student so that every loader finds its adapter again.

    peft calls DoRA's magnitudes by a name in its file that transformers does not find, so that they would start anew.
    """
    student.save_pretrained(str(folder))
    complete_names(folder)


def complete_names(folder: str | Path) -> None:
    """Give DoRA's magnitudes in an adapter's file the name by which both transformers and peft find them."""
    from safetensors.torch import load_file, save_file

    path = Path(folder) / "adapter_model.safetensors"
    if not path.is_file():
        return
    weights = load_file(path)
    if any(name.endswith("lora_magnitude_vector") for name in weights):
        renamed = {f"{n}.weight" if n.endswith("lora_magnitude_vector") else n: w for n, w in weights.items()}
        with replacing(path) as temporary:
            save_file(renamed, temporary, metadata={"format": "pt"})


def check_reload(student: Student, folder: Path, *, trust_remote_code: bool = False) -> None:
    """Stop where a saved student does not say what the one in memory says.

    Raises:
        RuntimeError: If it does not, as with a cross-encoder whose new pooler no adapter carries.
    """
    from st_wkl.models import is_trusted, load_model

    trusted = is_trusted(student, trust_remote_code)
    loaded = load_model(folder, trust_remote_code=trusted, dtype=student.dtype)[0]
    found = difference(outputs(student), outputs(loaded))
    if found > TOLERANCE:
        raise RuntimeError(
            f"{folder} holds another model than was trained: the outputs differ by up to {found:.2g}. An adapter "
            "carries no weights of its base model that were new when it was put on, as the pooler of a fresh "
            "cross-encoder. Save the base model first and train on from its folder, or train without lora."
        )


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
    from st_wkl.models import is_trusted, load_model
    from st_wkl.record import RECORD_FILE, TrainingRecord

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
    with owned(output), replacing_folder(output) as unfinished:
        merged.save_pretrained(str(unfinished))
        if (found := difference(expected, outputs(load_model(unfinished, trust_remote_code=trusted)[0]))) > TOLERANCE:
            raise RuntimeError(f"The merged model differs from the adapter's by up to {found:.2g}; nothing is kept.")
        if dtype is not torch.float32:
            merged.to(dtype).save_pretrained(str(unfinished))
        if record is not None and source is not None:
            record.precision = {**record.precision, "saved": name_of(dtype)}
            _take_along(source, unfinished, record)
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
    named = adapter_of(student).base_model_name_or_path
    if trained.get("base_revision") not in (None, found):
        raise ValueError(
            f"The adapter was trained on other weights than those of {named}: the hash of the base model was "
            f"{trained['base_revision']} and is {found}. Bring back the base model of that time."
        )
    if base is not None and base_hash(load_model(base, trust_remote_code=trust_remote_code)[0]) != found:  # type: ignore[arg-type]
        raise ValueError(f"The adapter belongs to {named}, whose weights are not those of {base}.")


def merged_in_place(student: Any) -> Any:
    """Merge a student's adapter into its weights and return it, as a model that never had one."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    transformer: Any = transformer_of(student)
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


def _take_along(source: Path, target: Path, record: Any) -> None:
    """Bring the record, the card and the hashes of the training texts of an adapter into the merged folder."""
    from st_wkl.publish.model_card import write_model_card
    from st_wkl.record import EXPOSURE_FILE

    record.lora = {**record.lora, "merged": True}
    if (source / EXPOSURE_FILE).is_file():
        shutil.copyfile(source / EXPOSURE_FILE, target / EXPOSURE_FILE)
    write_model_card(target, record=record, results={})
    record.save(target)


def outputs(model: Any) -> list[np.ndarray]:
    """Return what a model says to two texts."""
    training = model.training
    model.eval()
    with torch.no_grad():
        if hasattr(model, "predict"):
            found = [model.predict([tuple(_SAMPLE)], activation_fn=nn.Identity(), show_progress_bar=False)]
        else:
            found = [model.encode([text], show_progress_bar=False, convert_to_tensor=False)[0] for text in _SAMPLE]
    model.train(training)
    return [np.asarray(value.to_dense().cpu() if hasattr(value, "to_dense") else value, dtype=float) for value in found]


def difference(first: list[np.ndarray], second: list[np.ndarray]) -> float:
    """Return the largest difference of two models' outputs; NaN anywhere counts as infinite."""
    found = max(float(np.abs(a - b).max()) for a, b in zip(first, second, strict=True))
    return found if np.isfinite(found) else float("inf")
