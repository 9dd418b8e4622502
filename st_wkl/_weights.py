"""The hash of a model's weights: the one by which results and teacher scores know whose they are."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


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
