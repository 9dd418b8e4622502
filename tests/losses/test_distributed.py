"""Two processes must train what one trains at the same global batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.processes import run_module

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("distributed")]


@pytest.mark.parametrize("mini_batch_size", [0, 3])
def test_two_processes_equal_one(mini_batch_size: int, tiny_bert_path: Path, tmp_path: Path) -> None:
    """Gathered negatives and cached gradients each have their own synchronisation, and a missing one still trains."""
    weights = []
    for processes in (1, 2):
        output = tmp_path / f"{processes}.safetensors"
        arguments = (tiny_bert_path, output, processes, mini_batch_size)
        run_module("tests.losses.train_distributed", *arguments, processes=processes, timeout=300)
        weights.append(load_file(output))
    start = load_file(tiny_bert_path / "model.safetensors")
    name = "bert.embeddings.word_embeddings.weight"
    assert not torch.allclose(start[name].double(), weights[0]["0.model.embeddings.word_embeddings.weight"])
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=0, atol=1e-8, msg=name)
