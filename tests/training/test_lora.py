"""Adapters: the right layers, every hand-over with equal embeddings, and a test for each of upstream's traps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoHaConfig, LoraConfig
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import BertTokenizer, ModernBertConfig, ModernBertModel, Qwen3Config, Qwen3Model

from st_wkl import distill
from st_wkl.data.dataset import DistillationDataset
from st_wkl.packaged import MINILM
from st_wkl.record import TrainingRecord
from st_wkl.training.lora import base_hash, check_config, default_targets, has_adapter, merge, prepare
from tests.helpers.fake_hub import FakeHub
from tests.helpers.students import CLASSES, make_student
from tests.helpers.training import KillAt, Killed, arguments

TEXTS = ["do cats like water", "dogs like meat and water", "frogs"]


@pytest.fixture(scope="module")
def base(tiny_bert_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student saved whole, as the pooler of the bare encoder is made anew each time that it is loaded."""
    folder = tmp_path_factory.mktemp("lora") / "base"
    make_student("dense", tiny_bert_path).save_pretrained(str(folder))
    return folder


def embed(model: Any) -> np.ndarray:
    return (
        SentenceTransformer(str(model)).encode(TEXTS) if isinstance(model, str | Path) else model.eval().encode(TEXTS)
    )


def trained(base: Path, rows: DistillationDataset, folder: Path, **options: Any) -> Any:
    student = options.pop("student", None) or SentenceTransformer(str(base))
    args = arguments(student, folder, learning_rate=1e-2, save_steps=2)
    return distill(student, rows, args=args, output_dir=folder, lora=True, **options)


def test_targets_are_the_linear_layers_of_the_blocks(tiny_bert_path: Path, tmp_path: Path) -> None:
    """Each family has names of its own, and a pooler or a head among the targets would be trained for nothing."""
    tokenizer = BertTokenizer(str(tiny_bert_path / "vocab.txt"))
    small = {"vocab_size": 57, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    models = {
        "modernbert": ModernBertModel(ModernBertConfig(**small, intermediate_size=64, pad_token_id=0)),
        "qwen": Qwen3Model(Qwen3Config(**small, intermediate_size=64, num_key_value_heads=2, head_dim=16)),
    }
    students = {"bert": make_student("dense", tiny_bert_path)}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        transformer = Transformer(str(tmp_path / name))
        students[name] = SentenceTransformer(modules=[transformer, Pooling(32)])
    found = {name: set(default_targets(student)) for name, student in students.items()}
    assert found["bert"] == {
        *(f"attention.self.{part}" for part in ("query", "key", "value")),
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    }
    assert found["modernbert"] == {"attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo"}
    projections = {*(f"self_attn.{part}_proj" for part in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down"))}
    assert found["qwen"] == projections
    for student in students.values():
        report = prepare(student, True)
        names = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
        assert names
        assert all("lora_" in name for name in names)
        assert 0 < report["share"] < 1
        assert not any("pooler" in name for name in names)


@pytest.mark.slow
def test_every_hand_over_keeps_the_embeddings(
    base: Path,
    dataset: DistillationDataset,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Train, stop, resume, reload, go on, merge, reload: upstream loses weights or freezes them at most of these."""
    with caplog.at_level("INFO", logger="st_wkl"):
        whole = trained(base, dataset, tmp_path / "whole")
    assert "weights are trained (" in caplog.text
    with pytest.raises(Killed):
        trained(base, dataset, tmp_path / "cut", callbacks=[KillAt(3)])
    resumed = trained(base, dataset, tmp_path / "cut", resume=True)
    assert (embed(whole.student) == embed(resumed.student)).all()
    assert np.abs(embed(whole.folder) - embed(base)).max() > 1e-3
    assert np.abs(embed(whole.folder) - embed(whole.student)).max() < 1e-6
    # A reloaded adapter is frozen upstream: training on would fail in the first step.
    loaded = SentenceTransformer(str(whole.folder))
    assert not any(parameter.requires_grad for parameter in loaded[0].parameters())
    further = trained(base, dataset, tmp_path / "further", student=loaded)
    assert further.record.lora["adapter"] == "continued"
    assert np.abs(embed(further.folder) - embed(whole.folder)).max() > 1e-3
    # Merging in place leaves names that load as random weights upstream.
    for source in (further.folder, further.student):
        merged = merge(source, tmp_path / f"merged-{type(source).__name__}")
        assert not (merged / "adapter_config.json").exists()
        assert np.abs(embed(merged) - embed(further.folder)).max() < 1e-5
    assert has_adapter(further.student), "the student that was given stays as it is"
    record = TrainingRecord.load(tmp_path / f"merged-{type(further.folder).__name__}")
    assert record.lora["merged"]
    assert record.student == base.name
    card = (whole.folder / "README.md").read_text(encoding="utf-8")
    assert f"| LoRA | on `{base.name}`: rank `16`, alpha `32`" in card


VARIANTS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "bias-all": {"bias": "all"},
    "bias-lora": {"bias": "lora_only"},
    "lora-bias": {"lora_bias": True},
    "rslora": {"use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "rank-pattern": {"rank_pattern": {"query": 8}, "alpha_pattern": {"value": 2}},
    "layers": {"layers_to_transform": [1], "layers_pattern": "layer"},
    "modules-to-save": {"modules_to_save": ["LayerNorm"]},
    "tokens": {"trainable_token_indices": [5, 30]},
    "parameters": {"target_parameters": ["attention.output.dense.weight"]},
    "embeddings": {"target_modules": ["word_embeddings", "query"]},
    "all-linear": {"target_modules": "all-linear"},
    "together": {"use_dora": True, "bias": "lora_only", "modules_to_save": ["LayerNorm"], "use_rslora": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_kept(variant: str, base: Path, dataset: DistillationDataset, tmp_path: Path) -> None:
    """Upstream lost DoRA's magnitudes, froze biases and tokens at going on, and took their base for another one."""
    lora = LoraConfig(**{"r": 4, "target_modules": ["query", "value"], **VARIANTS[variant]})

    def run(student: Path, folder: str, **options: Any) -> Any:
        args = arguments(SentenceTransformer(str(base)), tmp_path, max_steps=3, save_steps=1, learning_rate=1e-2)
        return distill(student, dataset, args=args, output_dir=tmp_path / folder, **options)

    with pytest.raises(Killed):
        run(base, "student", lora=lora, callbacks=[KillAt(2)])
    made = run(base, "student", lora=lora, resume=True)
    assert np.abs(embed(made.folder) - embed(base)).max() > 1e-4
    assert np.abs(embed(made.folder) - embed(made.student)).max() < 1e-5
    assert np.abs(embed(merge(made.folder, tmp_path / "merged")) - embed(made.student)).max() < 1e-5
    further = run(made.folder, "further", lora=True)
    assert further.record.lora["trainable"] == made.record.lora["trainable"]
    assert np.abs(embed(further.folder) - embed(made.folder)).max() > 1e-4
    # Every token counts, also those that are in no sample.
    folders = made.folder, tmp_path / "merged"
    tables = [SentenceTransformer(str(folder))[0].auto_model.get_input_embeddings() for folder in folders]
    first, second = (table(torch.arange(57)).detach() for table in tables)
    assert torch.allclose(first, second, atol=1e-6)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "random start": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
    "statistics": ({"init_lora_weights": "eva"}, "init_lora_weights='eva' needs statistics"),
    "replication": ({"layer_replication": [(0, 2), (1, 2)]}, "layer_replication="),
    "saved twice": ({"bias": "all", "modules_to_save": ["LayerNorm"]}, "bias='all'.*cannot be saved"),
    "tokens": ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens switches"),
    "no layer": ({"layers_to_transform": [0, 9]}, r"layers_to_transform \[9\] do not exist"),
    "no token": ({"trainable_token_indices": [99]}, r"trainable_token_indices \[99\] do not exist"),
    "no parameter": ({"target_parameters": ["no.weight"]}, "target_parameters no.weight is no parameter"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_kept_is_refused_before_training(
    case: str, base: Path, dataset: DistillationDataset, tmp_path: Path
) -> None:
    """Some variants start from numbers or texts that nobody has any more when the adapter is loaded."""
    options, message = REFUSED[case]
    lora = LoraConfig(r=4, target_modules=["query", "value"], **options)
    with pytest.raises(ValueError, match=message):
        distill(base, dataset, output_dir=tmp_path / "student", lora=lora)
    assert not (tmp_path / "student").exists()


def test_other_adapters_and_other_configurations_are_errors(base: Path, dataset: DistillationDataset) -> None:
    """An adapter that goes on is the one that is there, whatever else would be asked for."""
    with pytest.raises(TypeError, match="got LoHaConfig"):
        distill(base, dataset, output_dir=base / "no", lora=LoHaConfig(target_modules=["query"]))  # type: ignore[arg-type]
    student = SentenceTransformer(str(base))
    prepare(student, LoraConfig(r=4, target_modules=["query"]))
    prepare(student, LoraConfig(r=4, target_modules=["query"], init_lora_weights="gaussian"))
    with pytest.raises(ValueError, match="use_dora False there, True asked for"):
        prepare(student, LoraConfig(r=4, target_modules=["query"], use_dora=True))


def test_cross_encoders_keep_their_head(
    tiny_bert_path: Path,
    dataset: DistillationDataset,
    tmp_path: Path,
) -> None:
    """The head and the pooler are outside of the adapter: one is saved with it, the other must come from the base."""
    fresh = make_student("cross-encoder", tiny_bert_path)
    fresh.save_pretrained(str(tmp_path / "base"))
    args = arguments(fresh, tmp_path, max_steps=2, learning_rate=1e-2)
    made = distill(tmp_path / "base", dataset, args=args, output_dir=tmp_path / "student", lora=True)
    merged = type(fresh)(str(merge(made.folder, tmp_path / "merged")))
    pairs = [("do cats like water", "cats like water"), ("frogs", "dogs like meat")]
    assert np.abs(merged.predict(pairs) - made.student.eval().predict(pairs)).max() < 1e-5
    with pytest.raises(RuntimeError, match="Save the base model first"):
        distill(fresh, dataset, args=args, output_dir=tmp_path / "second", lora=True)


def test_another_base_model_is_noticed(base: Path, dataset: DistillationDataset, tmp_path: Path) -> None:
    """An adapter fits every model of the same shape, and spoils all but one."""
    made = trained(base, dataset, tmp_path / "student")
    other = SentenceTransformer(str(base))
    assert base_hash(other) == base_hash(made.student) == made.record.lora["base_revision"]
    with torch.no_grad():
        next(iter(other[0].parameters())).add_(0.1)
    other.save_pretrained(str(tmp_path / "other"))
    with pytest.raises(ValueError, match="whose weights are not those of"):
        merge(made.folder, tmp_path / "merged", base=tmp_path / "other")
    config = made.folder / "adapter_config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**values, "base_model_name_or_path": str(tmp_path / "other")}), encoding="utf-8")
    with pytest.raises(ValueError, match="was trained on other weights"):
        merge(made.folder, tmp_path / "merged")
    with pytest.raises(ValueError, match="was trained on other weights"):
        distill(made.folder, dataset, output_dir=tmp_path / "further", lora=True)
    assert not (tmp_path / "merged").exists()
    assert not (tmp_path / "further").exists()


def test_bad_adapters_are_errors(
    base: Path,
    static_student_path: Path,
    dataset: DistillationDataset,
    tmp_path: Path,
) -> None:
    """A target that matches nothing is ignored by peft as long as another one matches."""
    student = SentenceTransformer(str(base))
    for targets in (["query", "q_proj"], "nonsense.*"):
        config = LoraConfig(target_modules=targets)
        with pytest.raises(
            ValueError, match=r"(q_proj|nonsense\.\*) match no module of BertModel.*attention\.self\.query"
        ):
            distill(student, dataset, output_dir=tmp_path / "student", lora=config)
    check_config(student, LoraConfig(target_modules=r".*\.query"))
    options = ("modules_to_save", ["poler"]), ("exclude_modules", ["kye"]), ("rank_pattern", {"kye": 4})
    for option, value in options:
        with pytest.raises(ValueError, match=rf"{option} (poler|kye) match no module of BertModel"):
            distill(
                student,
                dataset,
                output_dir=tmp_path / "student",
                lora=LoraConfig(target_modules=["query", "key"], **{option: value}),
            )
    found = {"modules_to_save": ["pooler"], "exclude_modules": ["0.attention.self.key"], "alpha_pattern": {"query": 4}}
    check_config(student, LoraConfig(target_modules=["query", "key"], **found))
    with pytest.raises(ValueError, match="modules_to_save must be a list"):
        check_config(student, LoraConfig(target_modules=["query"], modules_to_save="pooler"))
    with pytest.raises(ValueError, match="has nothing for LoRA to adapt"):
        distill(static_student_path, dataset, output_dir=tmp_path / "student", lora=True)
    with pytest.raises(ValueError, match="carries no adapter"):
        merge(base, tmp_path / "merged")
    prepare(student, True)
    with pytest.raises(ValueError, match="r 16 there, 4 asked for"):
        prepare(student, LoraConfig(r=4, target_modules=["query"]))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "keep.txt").touch()
    with pytest.raises(FileExistsError, match="is not empty"):
        merge(student, tmp_path / "mine")
    assert not (tmp_path / "student").exists()


PUSH = """
import sys, numpy as np
from sentence_transformers import SentenceTransformer
from st_wkl.publish.hub import push_student
push_student(sys.argv[1], "me/student")
np.save(sys.argv[2], SentenceTransformer("me/student").encode(eval(sys.argv[3])))
"""


@pytest.mark.slow
def test_the_whole_way_on_minilm_ends_on_the_hub(
    minilm_path: Path, dataset: DistillationDataset, tmp_path: Path
) -> None:
    """Tiny models share no sizes and no tokenizer with real ones; this is the way that a user goes."""

    def run(**options: Any) -> Any:
        student = SentenceTransformer(str(minilm_path))
        args = arguments(student, tmp_path, max_steps=3, save_steps=1, learning_rate=1e-3)
        folder = tmp_path / "adapter"
        return distill(student, dataset, args=args, output_dir=folder, lora=True, base_name=MINILM.hub_id, **options)

    with pytest.raises(Killed):
        run(callbacks=[KillAt(2)])
    made = run(resume=True)
    assert 0.01 < made.record.lora["share"] < 0.1
    expected = embed(made.student)
    assert np.abs(expected - embed(minilm_path)).max() > 1e-3
    merged = merge(made.folder, tmp_path / "student")
    assert np.abs(embed(made.folder) - expected).max() < 1e-6
    assert np.abs(embed(merged) - expected).max() < 1e-5
    with FakeHub() as hub:
        done = subprocess.run(
            [sys.executable, "-c", PUSH, str(merged), str(tmp_path / "found.npy"), repr(TEXTS)],
            env=hub.environment(tmp_path / "home"),
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    assert np.abs(np.load(tmp_path / "found.npy") - expected).max() < 1e-5


@pytest.mark.parametrize("kind", CLASSES)
def test_an_adapter_goes_on_every_class(
    kind: str, dataset: DistillationDataset, tiny_bert_path: Path, tmp_path: Path
) -> None:
    """Whether an adapter can be kept is tried first, and late interaction has no tensor to try it with."""
    make_student(kind, tiny_bert_path).save_pretrained(str(tmp_path / "base"))  # an adapter carries no new heads
    student: Any = CLASSES[kind](str(tmp_path / "base"))
    args = arguments(student, tmp_path, max_steps=1)
    made = distill(student, dataset, args=args, output_dir=tmp_path / "student", lora=True)
    assert (made.folder / "adapter_config.json").is_file()
