"""The cross-encoder teacher: raw logits from torch and ONNX, and an identity that tells models apart."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from st_wkl.data.collection import Collection
from st_wkl.data.teachers import CrossEncoderTeacher

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

BERLIN = [
    ("how many people live in Berlin", "Berlin had a population of 3,520,031 registered inhabitants in 2016."),
    ("how many people live in Berlin", "Berlin is well known for its museums."),
]


@pytest.fixture(scope="module")
def onnx_teacher(cross_encoder_onnx_path: Path) -> CrossEncoderTeacher:
    """Return the packaged int8 reranker."""
    return CrossEncoderTeacher(cross_encoder_onnx_path, batch_size=4)


@pytest.fixture
def torch_folder(shared_data: Path) -> Path:
    """Return the same reranker as a torch folder, or skip."""
    folder = shared_data.parent / "models" / "ms-marco-MiniLM-L12-v2"
    if not folder.is_dir():
        pytest.skip("needs ../shared/models/ms-marco-MiniLM-L12-v2")
    return folder


def tiny_cross_encoder(tokenizer_folder: Path, target: Path, num_labels: int = 1, seed: int = 0) -> CrossEncoder:
    """Make a random BERT cross-encoder of a few hundred kilobytes and return it, loaded from `target`."""
    import torch
    from sentence_transformers import CrossEncoder
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, initializer_range=3.0
    )
    config.num_labels = num_labels
    model = BertForSequenceClassification(config)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(target)
    return CrossEncoder(str(target), device="cpu")


def test_onnx_scores_are_raw_logits(onnx_teacher: CrossEncoderTeacher) -> None:
    """A sigmoid would squeeze 9 and 5 into 1.0: the student could not learn which is better."""
    scores = onnx_teacher.score(BERLIN)
    assert scores.dtype == np.float32
    assert scores[0] > 5
    assert scores[1] < -2


def test_torch_scores_are_raw_logits_whatever_the_config_says(torch_folder: Path, tmp_path: Path) -> None:
    """Most rerankers are saved with a sigmoid, which `predict` applies unless told otherwise."""
    for file in torch_folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((torch_folder / "config.json").read_text(encoding="utf-8"))
    config["sentence_transformers"] = {"activation_fn": "torch.nn.modules.activation.Sigmoid"}
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    scores = CrossEncoderTeacher(tmp_path, device="cpu").score(BERLIN)
    assert scores[0] > 5
    assert scores[1] < -2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_torch_and_onnx_agree(torch_folder: Path, onnx_teacher: CrossEncoderTeacher, shared_data: Path) -> None:
    """The two backends score the same model: same padding, truncation, segment ids, and order."""
    collection = Collection.load(shared_data / "noveleval")
    judged = list(collection.judgements("test").items())[:2]
    pairs = [
        (collection.queries[query_id], " ".join(collection.documents[document_id].split()[:60]))
        for query_id, documents in judged
        for document_id in list(documents)[:12]
    ]
    ours = onnx_teacher.score(pairs)
    theirs = CrossEncoderTeacher(torch_folder, device="cpu").score(pairs)
    ranks = [np.argsort(np.argsort(scores)) for scores in (ours, theirs)]
    assert np.corrcoef(ranks[0], ranks[1])[0, 1] > 0.98  # Spearman; int8 costs the rest
    assert np.abs(ours - theirs).mean() < 0.5
    assert np.abs(theirs).max() > 1


def test_order_is_kept(cross_encoder_onnx_path: Path) -> None:
    """Sorting by length inside must not show: with one pair a batch, any order gives the same scores to the bit."""
    teacher = CrossEncoderTeacher(cross_encoder_onnx_path, batch_size=1)
    pairs = [*BERLIN, ("cat", "A cat."), ("cat", "dog " * 40), ("", ""), ("cat", "")]
    scores = teacher.score(pairs)
    assert teacher.score(pairs[::-1]).tobytes() == scores[::-1].tobytes()
    assert teacher.score([]).shape == (0,)


def test_padding_does_not_change_scores(onnx_teacher: CrossEncoderTeacher, cross_encoder_onnx_path: Path) -> None:
    """A short pair beside a long one is padded; a forgotten attention mask would move its score."""
    long = ("query", "word " * 300)
    alone = CrossEncoderTeacher(cross_encoder_onnx_path, batch_size=1).score([*BERLIN, long])
    assert np.abs(onnx_teacher.score([*BERLIN, long]) - alone).max() < 1.0
    # tokenizer.json asks for padding to 512 tokens, three times the work of a usual pair.
    rows, _ = onnx_teacher._engine.encoder.encode([BERLIN[1]])  # type: ignore[union-attr]
    assert len(rows[0][0]) < 30


def test_long_pairs_are_cut_and_counted(cross_encoder_onnx_path: Path) -> None:
    """Text beyond the length is not read, even a million characters of it, and that is counted."""
    teacher = CrossEncoderTeacher(cross_encoder_onnx_path, max_length=32, batch_size=1)
    long = " ".join(["cats sleep"] * 30)
    scores = teacher.score([("cats", long), ("cats", long + " and dogs bark"), ("cats", "short")])
    assert scores[0] == scores[1]
    assert teacher.truncated_pairs == 2
    assert np.isfinite(teacher.score([("cats", "cats sleep " * 100_000)])).all()
    assert teacher.truncated_pairs == 3


def test_torch_counts_cut_pairs_exactly(cross_encoder_onnx_path: Path, tmp_path: Path) -> None:
    """`predict` cuts silently; a pair of exactly the maximum length is not cut."""
    tiny_cross_encoder(cross_encoder_onnx_path, tmp_path)
    teacher = CrossEncoderTeacher(tmp_path, max_length=16, device="cpu")
    assert teacher.identity["max_length"] == 16
    # [CLS] cat [SEP] ... [SEP]: 12 words fill 16 tokens.
    teacher.score([("cat", "dog " * 12), ("cat", "dog"), ("cat", "a" * 10)])
    assert teacher.truncated_pairs == 0
    teacher.score([("cat", "dog " * 13)])
    assert teacher.truncated_pairs == 1


def test_identity_tells_models_apart(cross_encoder_onnx_path: Path, tmp_path: Path) -> None:
    """Same weights elsewhere are the same teacher; other weights, tokenizer or length in the same folder are not."""
    original = CrossEncoderTeacher(cross_encoder_onnx_path).identity
    copy = tmp_path / cross_encoder_onnx_path.name
    shutil.copytree(cross_encoder_onnx_path, copy)
    assert CrossEncoderTeacher(copy).identity == original
    (copy / "README.md").write_text("a card decides no score", encoding="utf-8")
    assert CrossEncoderTeacher(copy).identity == original
    assert CrossEncoderTeacher(copy, max_length=128).identity != original
    with (copy / "tokenizer.json").open("a", encoding="utf-8") as file:
        file.write("\n")
    changed = CrossEncoderTeacher(copy).identity
    assert changed["revision"] != original["revision"]
    assert json.dumps(changed).count(str(tmp_path)) == 0, "an identity travels with the dataset: no paths of a machine"
    assert (original["backend"], original["max_length"], original["activation"]) == ("onnx", 512, "identity")


def test_identity_of_torch_models(cross_encoder_onnx_path: Path, tmp_path: Path) -> None:
    """Two models that are saved into one folder, or held in memory, one after the other, are two teachers."""
    first = tiny_cross_encoder(cross_encoder_onnx_path, tmp_path / "model", seed=0)
    from_folder = CrossEncoderTeacher(tmp_path / "model", device="cpu").identity
    second = tiny_cross_encoder(cross_encoder_onnx_path, tmp_path / "model", seed=1)
    assert CrossEncoderTeacher(tmp_path / "model", device="cpu").identity["revision"] != from_folder["revision"]
    identities = [CrossEncoderTeacher(model).identity for model in (first, second)]
    assert identities[0]["revision"] != identities[1]["revision"]
    assert identities[0]["model"] == "model"
    assert (identities[0]["dtype"], identities[0]["backend"]) == ("float32", "torch")
    half = CrossEncoderTeacher(second.bfloat16()).identity
    assert half["dtype"] == "bfloat16"


def test_loaded_cross_encoder_keeps_its_options(cross_encoder_onnx_path: Path, tmp_path: Path) -> None:
    """Options that would be ignored are refused; the prompt is part of the identity."""
    model = tiny_cross_encoder(cross_encoder_onnx_path, tmp_path)
    with pytest.raises(ValueError, match="keeps its own backend, max_length, dtype, revision and device"):
        CrossEncoderTeacher(model, max_length=128)
    plain, prompted = CrossEncoderTeacher(model), CrossEncoderTeacher(model, prompt="Judge: ")
    assert plain.identity != prompted.identity
    model.prompts["web"], model.default_prompt_name = "Find: ", "web"
    assert CrossEncoderTeacher(model).identity["prompt"] == "Find: "
    with pytest.raises(TypeError, match="a Hub id, a folder or a CrossEncoder, got int"):
        CrossEncoderTeacher(3)  # type: ignore[arg-type]


def test_several_labels_are_refused(cross_encoder_onnx_path: Path, tmp_path: Path) -> None:
    """A classifier gives several numbers for a pair, none of which is a relevance score."""
    tiny_cross_encoder(cross_encoder_onnx_path, tmp_path, num_labels=3)
    with pytest.raises(ValueError, match=r"has 3 labels.*num_labels=1"):
        CrossEncoderTeacher(tmp_path, device="cpu")


def test_missing_onnxruntime_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, cross_encoder_onnx_path: Path
) -> None:
    """It is an optional extra."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"pip install st-wkl\[onnx\]"):
        CrossEncoderTeacher(cross_encoder_onnx_path)


def test_wrong_folders_and_options(cross_encoder_onnx_path: Path, tmp_path: Path) -> None:
    """Each mistake is named at once, not after mining."""
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        CrossEncoderTeacher(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="has no weights for torch"):
        CrossEncoderTeacher(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"It has .*model\.onnx: use backend='onnx'"):
        CrossEncoderTeacher(cross_encoder_onnx_path, backend="torch")
    with pytest.raises(FileNotFoundError, match=r"lacks model\.onnx"):
        CrossEncoderTeacher(tmp_path, backend="onnx")
    with pytest.raises(ValueError, match="takes no prompt"):
        CrossEncoderTeacher(cross_encoder_onnx_path, prompt="Judge: ")
    with pytest.raises(ValueError, match="backend must be"):
        CrossEncoderTeacher(cross_encoder_onnx_path, backend="tensorflow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size must be 1 or more, got 0"):
        CrossEncoderTeacher(cross_encoder_onnx_path, batch_size=0)
    with pytest.raises(ValueError, match="cannot use the device 'tpu'"):
        CrossEncoderTeacher(cross_encoder_onnx_path, device="tpu")


@pytest.mark.slow
def test_hub_ids_are_known_by_their_commit(cross_encoder_onnx_path: Path, tmp_path: Path) -> None:
    """A branch moves, a commit does not; both backends resolve it, and a warm cache is enough without a network."""
    repository = tmp_path / "hub" / "models--org--tiny"
    for branch, sha, seed in (("main", "a" * 40, 0), ("dev", "b" * 40, 1)):
        snapshot = repository / "snapshots" / sha
        tiny_cross_encoder(cross_encoder_onnx_path, snapshot, seed=seed)
        (snapshot / "model.onnx").symlink_to(cross_encoder_onnx_path / "model.onnx")
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / branch).write_text(sha, encoding="utf-8")
    code = (
        "import json\n"
        "from st_wkl.data import CrossEncoderTeacher\n"
        "for revision, backend in ((None, 'auto'), ('dev', 'auto'), ('dev', 'onnx')):\n"
        "    teacher = CrossEncoderTeacher('org/tiny', revision=revision, backend=backend, device='cpu')\n"
        "    print(json.dumps([*teacher.identity.values(), float(teacher.score([('cat', 'a cat')])[0])]))\n"
    )
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    env.pop("HF_HUB_CACHE", None)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row[1:4] for row in rows] == [
        ["org/tiny", "a" * 40, "torch"],
        ["org/tiny", "b" * 40, "torch"],
        ["org/tiny", "b" * 40, "onnx"],
    ]
    assert len({row[-1] for row in rows}) == 3, "each revision and backend loads its own weights"


def test_onnx_folder_layouts(cross_encoder_onnx_path: Path, tmp_path: Path) -> None:
    """The Hub keeps ONNX exports in onnx/model.onnx beside the torch weights, which win unless asked otherwise."""
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").symlink_to(cross_encoder_onnx_path / "model.onnx")
    (tmp_path / "tokenizer.json").symlink_to(cross_encoder_onnx_path / "tokenizer.json")
    assert CrossEncoderTeacher(tmp_path).identity["backend"] == "onnx"
    tiny_cross_encoder(cross_encoder_onnx_path, tmp_path)
    assert CrossEncoderTeacher(tmp_path, device="cpu").identity["backend"] == "torch"
    assert CrossEncoderTeacher(tmp_path, backend="onnx").score(BERLIN)[0] > 5


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("packaged:potion-base-8M", "potion-base-8M is a retriever, .* take a reranker, such as packaged:ms-marco"),
        (lambda query, document: 1.0, r"got function\. Wrap a function: CallableTeacher\("),
    ],
    ids=["static", "function"],
)
def test_what_is_no_teacher_is_told_what_is(teacher: Any, message: str) -> None:
    """A static model failed with the advice to upgrade transformers, and a function with none."""
    with pytest.raises((TypeError, ValueError), match=message):
        CrossEncoderTeacher(teacher)
