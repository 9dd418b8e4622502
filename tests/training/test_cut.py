"""cut_layers(): what is left computes what its layers say, as a plain model, and what cannot be cut is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from sentence_transformers import SentenceTransformer
from transformers import (
    BertTokenizer,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5Model,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from st_wkl import cut_layers, distill
from st_wkl.data.dataset import DistillationDataset
from st_wkl.models import hash_weights, load_model
from st_wkl.pipeline.options import StudentConfig
from st_wkl.pipeline.steps import load_student
from st_wkl.training.lora import difference, outputs
from tests.helpers.students import CLASSES, make_student
from tests.helpers.training import arguments

_SIZES = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 6, "intermediate_size": 64}
_ARCHITECTURES = {
    "modernbert": lambda n: ModernBertModel(ModernBertConfig(**_SIZES, vocab_size=n, pad_token_id=0)),
    "qwen": lambda n: Qwen3Model(Qwen3Config(**_SIZES, vocab_size=n, num_key_value_heads=2, head_dim=16)),
    "mpnet": lambda n: MPNetModel(MPNetConfig(**_SIZES, vocab_size=n)),
    "xlm-roberta": lambda n: XLMRobertaModel(XLMRobertaConfig(**_SIZES, vocab_size=n)),
}


@pytest.fixture
def deep(tiny_bert_path: Path, tmp_path: Path) -> Any:
    """Return a function that saves a six-layer model of an architecture."""

    def save(name: str, make: Any = None) -> Path:
        tokenizer, folder = BertTokenizer.from_pretrained(str(tiny_bert_path)), tmp_path / name
        torch.manual_seed(0)
        (make or _ARCHITECTURES[name])(len(tokenizer)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


def _by_hand(folder: Path, layers: list[int], text: str) -> Any:
    """Compute an embedding with the layers that are left out turned into the identity, in the whole model."""
    model = SentenceTransformer(str(folder))
    stack = next(part for part in model.modules() if isinstance(part, torch.nn.ModuleList) and len(part) == 6)
    for number, layer in enumerate(stack):
        if number not in layers:
            several = "MPNet" in type(layer).__name__
            layer.forward = lambda hidden, *_, several=several, **__: (hidden,) if several else hidden
    return model.encode(text)


@pytest.mark.parametrize("name", _ARCHITECTURES)
@pytest.mark.parametrize("keep", [3, 2, [0, 3, 4]])
def test_it_computes_what_its_layers_say(name: str, keep: Any, deep: Any, tmp_path: Path) -> None:
    """A layer at another's place, or with another's kind of attention, would be another model without a word."""
    folder = deep(name)
    layers = {3: [0, 2, 5], 2: [0, 5]}.get(keep if isinstance(keep, int) else 0, keep)
    small = SentenceTransformer(str(cut_layers(folder, keep, output=tmp_path / "small")))
    for text in ("a", "some words that are a bit longer than the others"):
        np.testing.assert_allclose(small.encode(text), _by_hand(folder, layers, text), atol=1e-5)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["num_hidden_layers"] == len(layers)


@pytest.mark.parametrize("kind", CLASSES)
def test_every_class_is_cut_and_taught(
    kind: str, dataset: DistillationDataset, tiny_bert_path: Path, tmp_path: Path
) -> None:
    """Heads stand on the last layer, whatever they are; and the original is somebody's."""
    student = make_student(kind, tiny_bert_path)
    before = hash_weights(student)
    folder = cut_layers(student, 1, output=tmp_path / "small")
    assert hash_weights(student) == before
    small, _ = load_model(folder)
    assert type(small) is CLASSES[kind]
    assert sum(value.numel() for value in small.parameters()) < sum(value.numel() for value in student.parameters())
    made = distill(small, dataset, args=arguments(small, tmp_path, max_steps=1), output_dir=tmp_path / "student")
    assert made.record.student == "small"


def test_without_st_wkl_it_is_a_plain_model(deep: Any, tmp_path: Path) -> None:
    """Whoever gets the folder needs nothing of this package, and its card does not boast with another's numbers."""
    folder = deep("mpnet")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# The best\n\nnDCG@10 0.99\n")
    small = cut_layers(folder, 2, output=tmp_path / "small")
    code = f"from sentence_transformers import SentenceTransformer as S; print(*S({str(small)!r}).encode('cats')[:4])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    expected = SentenceTransformer(str(small)).encode("cats")[:4]
    np.testing.assert_allclose([float(value) for value in found.stdout.split()], expected, atol=1e-5)
    card = (small / "README.md").read_text()
    assert "license: mit" in card
    assert "2 of 6 layers" in card
    assert "0.99" not in card


def test_as_an_option_of_the_student(deep: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is started again has to start from the same weights, under a name that says what they are."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = StudentConfig(str(deep("qwen")), layers=2)
    (first, name), (second, _) = load_student(options), load_student(options)
    assert name == "qwen, 2 layers"
    assert hash_weights(first) == hash_weights(second)
    assert difference(outputs(first), outputs(second)) == 0
    assert [path.name[:14] for path in (tmp_path / "cache" / "st_wkl" / "cut").iterdir()] == ["qwen-layers-0-"]


def test_a_layer_that_was_made_for_its_place(deep: Any, tmp_path: Path) -> None:
    """ModernBERT's first layer has no norm: another one at its place loses its own when it is loaded."""
    with pytest.raises(ValueError, match="answers otherwise"):
        cut_layers(deep("modernbert"), [1, 3], output=tmp_path / "small")
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("keep", [0, 6, -1, True, [], [0, 6], [2, 1], [0, 0], [0.0], "02", [*range(6)]])
def test_layers_that_there_are_not(keep: Any, deep: Any, tmp_path: Path) -> None:
    """Refused before anything is written."""
    with pytest.raises(ValueError, match="keep"):
        cut_layers(deep("mpnet"), keep, output=tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_what_has_no_single_stack_is_refused(
    deep: Any, static_student_path: Path, tiny_bert_path: Path, tmp_path: Path
) -> None:
    """A table has no layers, an encoder and a decoder have two kinds, an adapter has weights beside them."""
    with pytest.raises(ValueError, match="has no layers of a transformer"):
        cut_layers(static_student_path)
    t5 = deep("t5", lambda n: T5Model(T5Config(vocab_size=n, d_model=32, d_kv=16, d_ff=64, num_layers=6, num_heads=2)))
    module = SentenceTransformer(str(static_student_path))
    module.transformers_model_ = T5Model.from_pretrained(t5)
    with pytest.raises(ValueError, match="several stacks of 6 layers"):
        cut_layers(module)
    student = make_student("dense", tiny_bert_path)
    student.add_adapter(LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(ValueError, match="has an adapter"):
        cut_layers(student, 1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(FileExistsError, match="is not empty"):
        cut_layers(deep("mpnet"), output=tmp_path / "full")
