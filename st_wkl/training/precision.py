"""The number type that a student's weights are trained and saved in."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from st_wkl.losses.scoring import Student

logger = logging.getLogger(__name__)

# Of 8 and 11 significant bits: an update of less than a thousandth of a weight is rounded away.
HALF = (torch.bfloat16, torch.float16)
_SAVED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def named_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return one of the number types that weights are saved in.

    Raises:
        ValueError: If it is none of float32, bfloat16 and float16.
    """
    found = _SAVED.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if found is None or found not in _SAVED.values():
        raise ValueError(f"There is no number type {dtype!r} to save weights in; those are {', '.join(_SAVED)}.")
    return found


def name_of(dtype: torch.dtype | None) -> str:
    """Return how a record names a number type."""
    return str(dtype).removeprefix("torch.")


def to_master(student: Student) -> torch.dtype | None:
    """Turn weights in half precision into float32, in place, and return the type that they had.

    A folder that was saved in bfloat16 or float16 is loaded so unless somebody says otherwise, and a step of training
    is smaller than what such a number can hold. The values stay as they are. A student that its owner has cast, so that
    it is of another type than what its folder holds, is trained as it was given.

    Returns:
        The number type of the weights as they came; None if there are none of floating point.
    """
    weights = [weight for weight in student.parameters() if weight.is_floating_point()]
    half = {weight.dtype for weight in weights} & {*HALF}
    if not half:
        return weights[0].dtype if weights else None
    given = min(half, key=str)
    if _was_cast(student, given):
        logger.warning(
            "The student was cast to %s and is trained in it: updates that are small beside their weights are rounded "
            "away. Leave it in float32 and set bf16=True in args for speed.",
            name_of(given),
        )
        return given
    for tensor in (*student.parameters(), *student.buffers()):
        if tensor.dtype in HALF:
            tensor.data = tensor.data.float()
    logger.info(
        "The student's weights are %s; they are trained, and saved unless save_dtype says otherwise, in float32. For "
        "speed, set bf16=True in args.",
        name_of(given),
    )
    return given


def _was_cast(student: Student, dtype: torch.dtype) -> bool:
    """Tell whether somebody asked for this number type: it is neither that of the configuration nor of the folder."""
    config = getattr(student, "config", None)
    loaded = getattr(config, "dtype", None)
    if isinstance(loaded, torch.dtype) and loaded is not dtype:
        return True
    stored = _stored_dtype(getattr(config, "name_or_path", None))
    return stored is not None and stored is not dtype


def _stored_dtype(source: str | None) -> torch.dtype | None:
    """Return the number type that transformers loads a folder or Hub id in by default, None if that is not known."""
    from sentence_transformers.util import load_file_path

    if not source:
        return None

    def read(file: str) -> Any:
        path = load_file_path(source, file)
        return json.loads(Path(path).read_text(encoding="utf-8")) if path else None

    try:
        modules = read("modules.json") or [{"path": ""}]
        folder = modules[0]["path"]
        prefix = f"{folder}/" if folder else ""
        config = read(f"{prefix}config.json") or {}
        if named := config.get("dtype") or config.get("torch_dtype"):
            return getattr(torch, str(named).removeprefix("torch."), None)
        weights = load_file_path(source, f"{prefix}model.safetensors")
    except (OSError, ValueError, LookupError):
        return None
    return _first_dtype(weights) if weights else None


def _first_dtype(weights: str) -> torch.dtype | None:
    """Return the number type of the first weights of floating point in a file, from its header alone."""
    from safetensors import safe_open

    with safe_open(weights, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - no mapping
            if (tensor := file.get_slice(name)[:0]).is_floating_point():
                return tensor.dtype
    return None
