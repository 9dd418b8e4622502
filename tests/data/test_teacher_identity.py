"""No score of another model: a teacher's identity changes with all that decides a score, and with nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer, BitsAndBytesConfig

from st_wkl.data.cross_encoder import _plain_kwargs
from st_wkl.data.score_store import ScoreStore
from st_wkl.data.scoring import score_pairs
from st_wkl.data.teachers import CrossEncoderTeacher
from st_wkl.methods.collective import FeedbackTeacher, TokenFeedbackTeacher
from st_wkl.models import identity, model_revision

PAIRS = [("ABC", "DEF abc"), ("abc", "def")]
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def save_cross_encoder(folder: Path, *, lower: bool = True, swap: bool = False) -> Path:
    """Save a tiny random cross-encoder; the same weights for every tokenizer."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    vocabulary += ["dtype", "revision"] if swap else ["revision", "dtype"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=1,
        initializer_range=0.5,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    BertTokenizer(str(folder / "vocab.txt"), do_lower_case=lower).save_pretrained(folder)
    return folder


def loaded(folder: Path) -> Any:
    """Load one on the CPU, under one name whatever its folder."""
    model = CrossEncoder(str(folder), max_length=64, device="cpu")
    model.model_card_data.base_model = "same"
    return model


def test_two_tokenizers_never_share_a_score(tmp_path: Path) -> None:
    """Equal weights under another tokenizer are another teacher: the store served the first one's scores."""
    first, second = (
        CrossEncoderTeacher(loaded(save_cross_encoder(tmp_path / str(lower), lower=lower))) for lower in (True, False)
    )
    with ScoreStore(":memory:") as store:
        for teacher in (first, second):
            stored = score_pairs(teacher, PAIRS, store=store, show_progress=False)
            assert stored.tolist() == pytest.approx(teacher.score(PAIRS).tolist(), abs=1e-6)


def _adapted(model: Any) -> None:
    from peft import LoraConfig

    model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["query"], init_lora_weights=False))


@pytest.mark.parametrize(
    "change",
    [
        _adapted,
        lambda model: setattr(model, "max_seq_length", 8),
        lambda model: model.prompts.update(revision="Judge: "),
        lambda model: setattr(model.tokenizer, "truncation_side", "left"),
        lambda model: setattr(model.tokenizer, "model_input_names", ["input_ids", "attention_mask"]),
        lambda model: setattr(model.tokenizer, "chat_template", "{{ messages }}"),
        lambda model: model.tokenizer.add_tokens(["st_wkl"]),
        lambda model: setattr(model.config, "layer_norm_eps", 0.1),
        lambda model: setattr(model[0], "processing_kwargs", {"text": {"add_special_tokens": False}}),
        lambda model: setattr(model, "activation_fn", torch.nn.LeakyReLU(0.3)),
        lambda model: setattr(model, "keep_in_fp32_modules", ["0.model.classifier"]),
        lambda model: setattr(model, "module_kwargs", {"0": ["task"]}),
    ],
)
def test_each_setting_of_a_loaded_model_counts(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    """What decides an output and is no weight; the same model loaded twice stays the same."""
    folder = save_cross_encoder(tmp_path)
    before, model = identity(loaded(folder)), loaded(folder)
    assert identity(model) == before
    change(model)
    assert identity(model)["settings"] != before["settings"]
    assert model_revision(model) != model_revision(loaded(folder))


def test_options_of_an_activation_and_names_like_settings_count(tmp_path: Path) -> None:
    """The type alone left the slope out, and a vocabulary's words that are named like settings were dropped."""
    model = loaded(save_cross_encoder(tmp_path / "a"))
    seen = set()
    for activation in (torch.nn.LeakyReLU(0.1), torch.nn.LeakyReLU(0.2), torch.nn.PReLU(), lambda x: x, lambda x: -x):
        model.activation_fn = activation
        seen.add(model_revision(model))
    assert len(seen) == 5
    swapped = loaded(save_cross_encoder(tmp_path / "b", swap=True))
    assert identity(swapped)["settings"] != identity(loaded(tmp_path / "a"))["settings"]


def test_an_adapter_that_is_off_is_another_teacher(tmp_path: Path) -> None:
    """On or off, the weights are the same; and a model that is switched after it became a teacher is refused."""
    model = loaded(save_cross_encoder(tmp_path))
    _adapted(model)
    teacher = CrossEncoderTeacher(model)
    model.disable_adapters()
    assert CrossEncoderTeacher(model).identity != teacher.identity
    with pytest.raises(ValueError, match="changed after it became a teacher"):
        teacher.score(PAIRS)


def test_a_teacher_that_is_trained_is_refused(tmp_path: Path) -> None:
    """Its scores would be kept under the weights that it had before."""
    model = loaded(save_cross_encoder(tmp_path))
    teacher = CrossEncoderTeacher(model)
    teacher.score(PAIRS)
    with torch.no_grad():
        next(iter(model.parameters())).add_(0.1)
    with pytest.raises(ValueError, match="changed after it became a teacher"):
        teacher.score(PAIRS)


def test_files_that_say_nothing_new_keep_a_folders_key(tmp_path: Path) -> None:
    """Cards, logs, other backends and settings that stand in the identity anyway must not orphan stored scores."""
    folder = save_cross_encoder(tmp_path / "model")
    bare = CrossEncoderTeacher(folder, device="cpu").identity
    assert "settings" not in bare
    for name in ("README.md", "trainer_state.json", "onnx/model.onnx", "eval/results.txt", ".git/HEAD"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text('{"cls_token": "[CLS]"}', encoding="utf-8")
    assert CrossEncoderTeacher(folder, device="cpu").identity == bare
    resaved = tmp_path / "again" / "model"
    CrossEncoder(str(folder), device="cpu").save_pretrained(str(resaved))
    assert "settings" not in CrossEncoderTeacher(resaved, device="cpu").identity


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("sentence_bert_config.json", '{"do_lower_case": true}'),
        ("sentence_bert_config.json", '{"processing_kwargs": {"text": {"add_special_tokens": false}}}'),
        ("config_sentence_transformers.json", '{"keep_in_fp32_modules": ["0.model.classifier"]}'),
        ("special_tokens_map.json", '{"sep_token": "[CLS]"}'),
        ("added_tokens.json", '{"a": 5}'),
        ("chat_template.jinja", "{{ messages }}"),
        ("modeling_own.py", "x = 1"),
        ("anything.json", "{}"),
    ],
)
def test_a_folders_other_settings_count(tmp_path: Path, file: str, text: str) -> None:
    """Two folders that differ in one settings file that no list named had one key."""
    folder = save_cross_encoder(tmp_path / "model")
    bare = CrossEncoderTeacher(folder, device="cpu").identity
    (folder / file).write_text(text, encoding="utf-8")
    changed = CrossEncoderTeacher(folder, device="cpu").identity
    assert changed.pop("settings")
    assert changed == bare, "the former key is in it, so that stored scores can be found"


def test_what_the_model_is_loaded_with_counts(tmp_path: Path) -> None:
    """Another attention or quantisation gives other scores; where the weights lie gives none, and old keys stay."""
    folder = save_cross_encoder(tmp_path)
    bare = CrossEncoderTeacher(folder, device="cpu").identity
    assert "model_kwargs" not in bare
    eager = CrossEncoderTeacher(folder, device="cpu", model_kwargs={"attn_implementation": "eager"}).identity
    assert eager == bare | {"model_kwargs": {"attn_implementation": "eager"}}
    assert CrossEncoderTeacher(folder, device="cpu", model_kwargs={"low_cpu_mem_usage": True}).identity == bare
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    told = _plain_kwargs({"quantization_config": quantised, "sizes": (1, 2.5)})
    assert (told["quantization_config"]["bnb_4bit_compute_dtype"], told["sizes"]) == ("bfloat16", [1, 2.5])
    json.dumps(told)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (
            {"torch_dtype": "float16"},
            r"model_kwargs.torch_dtype is not for model_kwargs: dtype is an option of its own",
        ),
        ({"token": "secret"}, r"model_kwargs.token is not for model_kwargs: log in with"),
        ({"revision": "main"}, r"model_kwargs.revision is not for"),
        ({"hook": print}, r"model_kwargs.hook is <built-in function print>, which no identity can hold"),
        ({"scale": float("nan")}, r"model_kwargs.scale is nan"),
    ],
)
def test_what_the_identity_could_not_hold_is_refused(tmp_path: Path, told: dict[str, Any], message: str) -> None:
    """A revision past the option of that name would score under the name of another; a token would be in the store."""
    with pytest.raises(ValueError, match=message) as error:
        CrossEncoderTeacher(save_cross_encoder(tmp_path), device="cpu", model_kwargs=told)
    assert "secret" not in str(error.value)
    with pytest.raises(ValueError, match="A loaded CrossEncoder keeps its own"):
        CrossEncoderTeacher(loaded(tmp_path), model_kwargs={"attn_implementation": "eager"})


def test_an_adapters_folder_counts_its_base(tmp_path: Path) -> None:
    """The base model lies elsewhere and may change; the folder of the adapter stays the same."""
    base = save_cross_encoder(tmp_path / "base")
    model = loaded(base)
    _adapted(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    before = CrossEncoderTeacher(tmp_path / "adapter", device="cpu").identity
    changed = loaded(base)
    with torch.no_grad():
        changed.transformers_model.classifier.weight.add_(1.0)
    shutil.rmtree(base)
    changed.save_pretrained(str(base))
    assert CrossEncoderTeacher(tmp_path / "adapter", device="cpu").identity != before


def test_scores_under_a_former_key_are_named_and_adopted_on_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They may be another tokenizer's, so they are not used; but hours of work are never lost without a word."""
    teacher = CrossEncoderTeacher(loaded(save_cross_encoder(tmp_path)))
    former = {name: value for name, value in teacher.identity.items() if name != "settings"}
    with ScoreStore(":memory:") as store:
        store.put(former, PAIRS, [100.0, 200.0])
        assert store.adopt({"kind": "callable"}) == 0
        score_pairs(teacher, PAIRS[:1], store=store, show_progress=False)
        assert "under the key that earlier versions gave this teacher" in caplog.text
        assert store.adopt(teacher.identity) == 1, "what is scored anew stays"
        assert store.get(teacher.identity, PAIRS)[1] == 200.0
        assert store.get(teacher.identity, PAIRS)[0] < 100.0
        assert json.dumps(store.info().teachers).count('"settings"') == 1


def test_retrievers_that_teach_themselves_count_their_settings(tiny_bert_path: Path, tmp_path: Path) -> None:
    """Their tokenizer and modules decide their scores as well."""
    dense = SentenceTransformer(str(tiny_bert_path), device="cpu")
    MultiVectorEncoder(str(tiny_bert_path), device="cpu").save_pretrained(str(tmp_path))
    tokens = MultiVectorEncoder(str(tmp_path), device="cpu")
    for teacher in (FeedbackTeacher(dense), TokenFeedbackTeacher(tokens, ["a text"])):
        before = teacher.identity
        teacher.model.tokenizer.add_tokens(["st_wkl"])
        assert teacher.identity != before


def test_quantised_weights_have_a_hash(tmp_path: Path) -> None:
    """A state dict of torch's quantised modules holds types and packed tensors; the docstring promises quantisation."""
    plain = loaded(save_cross_encoder(tmp_path))
    for _ in range(2):
        quantised = torch.ao.quantization.quantize_dynamic(loaded(tmp_path), {torch.nn.Linear})
        assert identity(quantised) == identity(torch.ao.quantization.quantize_dynamic(plain, {torch.nn.Linear}))
    assert identity(quantised)["weights"] != identity(plain)["weights"]


def _louder(module: Any, inputs: Any, output: Any) -> Any:
    return {**output, "scores": output["scores"] * 2}


def test_forward_hooks_are_refused_and_noticed(tmp_path: Path) -> None:
    """A hook changes every score and is in no file: the store served the scores of the model without it."""
    plain, hooked = loaded(save_cross_encoder(tmp_path)), loaded(tmp_path)
    teacher = CrossEncoderTeacher(plain)
    assert teacher.score(PAIRS).shape == (2,)
    hooked.register_forward_hook(partial(_louder))
    with pytest.raises(ValueError, match=r"forward hooks of your own \(: _louder\).*CallableTeacher"):
        CrossEncoderTeacher(hooked)
    assert identity(hooked)["settings"] != identity(plain)["settings"]
    plain.register_forward_hook(_louder)
    with pytest.raises(ValueError, match="was changed after it became a teacher"):
        teacher.score(PAIRS)
