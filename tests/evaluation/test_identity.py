"""A model's revision must change exactly when its output can change."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

from st_wkl.evaluation.identity import identified
from st_wkl.models import load_model, model_name, model_revision


@pytest.fixture(scope="module")
def tiny_bert(static_student_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that saves a tiny random BERT with a real vocabulary and returns its folder."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(static_student_path / "tokenizer.json"),
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
    )

    def build(head: type) -> Path:
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        sizes |= {"vocab_size": len(tokenizer), "intermediate_size": 16, "max_position_embeddings": 64, "num_labels": 1}
        config = BertConfig(**sizes)
        folder = tmp_path_factory.mktemp("tiny-bert")
        head(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return build


@pytest.fixture(
    params=[
        (SentenceTransformer, BertModel),
        (SparseEncoder, BertForMaskedLM),
        (MultiVectorEncoder, BertForMaskedLM),  # saving renames the architecture in its config
        (CrossEncoder, BertForSequenceClassification),
    ],
    ids=lambda param: param[0].__name__,
)
def model(request: pytest.FixtureRequest, tiny_bert: Any) -> Any:
    """Return a tiny model of each of the four classes."""
    cls, head = request.param
    return cls(str(tiny_bert(head)), device="cpu")


def test_saving_and_loading_keeps_the_revision_and_the_class(model: Any, tmp_path: Path) -> None:
    """A student must be recognised when its folder is loaded, and as what it was saved."""
    before = model_revision(model)
    model.save_pretrained(str(tmp_path / "student"))
    loaded, name = load_model(tmp_path / "student")
    assert type(loaded) is type(model)
    assert name == "student"
    assert model_revision(loaded) == before


def test_use_does_not_change_the_revision(model: Any) -> None:
    """Fast tokenizers remember the padding of the last call; that must not look like another model."""
    before = model_revision(model)
    if isinstance(model, CrossEncoder):
        model.predict([("a query", "a document"), ("a query", "a longer document")])
    else:
        model.encode(["a text", "a longer text"])
    assert model_revision(model) == before


def test_one_changed_weight_is_another_revision(model: Any) -> None:
    """A model that was trained on in memory must not be taken for its base."""
    before = model_revision(model)
    with torch.no_grad():
        next(iter(model.parameters())).view(-1)[3] += 1e-4
    assert model_revision(model) != before


def test_swapped_weights_are_another_revision(model: Any) -> None:
    """The same bytes in another order are another model, so names and places must count."""
    before = model_revision(model)
    with torch.no_grad():
        weight = next(iter(model.parameters()))
        weight[[0, 1]] = weight[[1, 0]]
    assert model_revision(model) != before


@pytest.mark.parametrize(
    ("attribute", "value"),
    [("prompts", {"query": "query: ", "document": ""}), ("max_seq_length", 8), ("similarity_fn_name", "euclidean")],
)
def test_settings_that_change_the_output_change_the_revision(tiny_bert: Any, attribute: str, value: Any) -> None:
    """Weights are not all: a prompt, a length or a similarity moves the scores as well."""
    model: Any = SentenceTransformer(str(tiny_bert(BertModel)), device="cpu")
    before = model_revision(model)
    setattr(model, attribute, value)
    assert model_revision(model) != before


def test_module_settings_truncation_and_tokenizer_count(static_student_path: Path, tiny_bert: Any) -> None:
    """Pooling, Matryoshka truncation and the vocabulary decide embeddings without being weights."""
    student: Any = SentenceTransformer(str(static_student_path), device="cpu")
    tiny: Any = SentenceTransformer(str(tiny_bert(BertModel)), device="cpu")
    seen = {model_revision(student), model_revision(tiny)}
    student.truncate_dim = 64
    tiny[1].pooling_mode = "cls"
    seen |= {model_revision(student), model_revision(tiny)}
    student.tokenizer.add_tokens(["st_wkl"])
    seen.add(model_revision(student))
    assert len(seen) == 5


def test_empty_prompts_are_no_prompts(static_student_path: Path) -> None:
    """sentence-transformers fills in empty prompts on loading; they change nothing."""
    model: Any = SentenceTransformer(str(static_student_path), device="cpu")
    before = model_revision(model)
    model.prompts = {}
    assert model_revision(model) == before


def test_adapters_count(tiny_bert: Any, tmp_path: Path) -> None:
    """LoRA's scaling and on/off switch are not in the state dict, but they are in the embeddings."""
    from peft import LoraConfig

    model: Any = SentenceTransformer(str(tiny_bert(BertModel)), device="cpu")
    seen = [model_revision(model)]
    model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["query"]))
    seen.append(model_revision(model))
    model.save_pretrained(str(tmp_path / "adapter"))
    loaded, _ = load_model(tmp_path / "adapter")
    assert model_revision(loaded) == seen[-1]
    model.disable_adapters()
    seen.append(model_revision(model))
    assert len(set(seen)) == 3


def test_dtype_and_shape_are_part_of_the_revision(static_student_path: Path) -> None:
    """Rounding to bfloat16 moves scores, and numpy has no bfloat16; and the same bytes can be another matrix."""
    model: Any = SentenceTransformer(str(static_student_path), device="cpu")
    seen = {model_revision(model), model_revision(copy.deepcopy(model).bfloat16())}
    weight = model[0].embedding.weight
    weight.data = weight.data.reshape(weight.shape[::-1])
    assert len(seen | {model_revision(model)}) == 3


def test_a_model_without_torch_weights_needs_a_revision(static_student_path: Path) -> None:
    """All ONNX models would share the hash of nothing, and so each other's results."""
    model: Any = SentenceTransformer(str(static_student_path), device="cpu")
    model[0].embedding = None
    with pytest.raises(ValueError, match="pass revision="):
        model_revision(model)


def test_names(static_student_path: Path, tiny_bert: Any) -> None:
    """A name must never be a path of this machine, and MTEB needs an organisation before it."""
    model: Any = SentenceTransformer(str(static_student_path), device="cpu")
    assert model_name(model) == "SentenceTransformer"
    folder = tiny_bert(BertModel)
    assert model_name(SentenceTransformer(str(folder), device="cpu")) == folder.name
    model.model_card_data.base_model = "tester/base"
    assert model_name(model) == "tester/base"
    meta = identified(model, name="student").mteb_model_meta
    assert (meta.name, meta.revision) == ("local/student", model_revision(model))
    assert identified(model, name="org/student", revision="v2").mteb_model_meta.revision == "v2"


def test_what_is_no_model_is_refused() -> None:
    """A wrong argument must be named, not fail deep inside MTEB."""
    wrong: Any = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match="SentenceTransformer, SparseEncoder"):
        load_model(wrong)


def test_a_static_models_truncation_counts(static_student_path: Path) -> None:
    """Nobody sets it anew with every call, as transformers does: a text that is cut has another embedding."""
    model = SentenceTransformer(str(static_student_path), device="cpu")
    revision = model_revision(model)
    model[0].tokenizer.enable_truncation(2)
    cut = model_revision(model)
    model[0].tokenizer.no_truncation()
    assert cut != revision == model_revision(model)
