"""One hash says whose results and scores these are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn

from st_wkl.models import hash_weights


def test_same_weights_same_hash(tmp_path: Path) -> None:
    """Saved, loaded and made in another order, a model must find its scores again."""
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(2, 2)})
    save_model(model, str(tmp_path / "model.safetensors"))
    loaded = nn.ModuleDict({"b": nn.Linear(2, 2), "a": nn.Linear(3, 2)})
    assert hash_weights(loaded) != hash_weights(model)
    load_model(loaded, str(tmp_path / "model.safetensors"))
    assert hash_weights(loaded) == hash_weights(model)


def test_other_weights_other_hash() -> None:
    """One weight, a type or a shape that changed makes another teacher."""
    model = nn.Linear(4, 2, bias=False)
    hashes = {hash_weights(model), hash_weights(nn.Linear(4, 2, bias=False))}
    reshaped = nn.Linear(2, 4, bias=False)
    with torch.no_grad():
        reshaped.weight.copy_(model.weight.view(4, 2))
        hashes |= {hash_weights(reshaped)}
        model.weight[0, 0] += 1e-3
        hashes |= {hash_weights(model), hash_weights(model.to(torch.bfloat16))}
    assert len(hashes) == 5


def test_weights_that_are_not_loaded() -> None:
    """A model on the meta device has no bytes; all such models would share one hash."""
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="'bias' is not loaded"):
        hash_weights(model)
