"""Asymmetric students: queries of a small encoder, documents of another one that stays."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.sentence_transformer.modules import Router

from st_wkl.data.dataset import DistillationDataset
from st_wkl.evaluation import evaluate
from st_wkl.models import identity, load_model, set_prompts
from st_wkl.packaged import MINILM, STATIC_STUDENT, fetch
from st_wkl.record import TrainingRecord
from st_wkl.training.asymmetric import asymmetric_student, frozen_documents
from st_wkl.training.cut import cut_layers
from st_wkl.training.distillation import distill
from st_wkl.training.lora import check_config
from tests.helpers.animals import small_collection
from tests.helpers.command import st_wkl

TEXTS = [
    f"{what} {number} like {other}" for number in range(60) for what, other in (("cats", "fish"), ("dogs", "meat"))
]
TEXTS += [f"{word} water" for word in "abcdefghijklmnopqrstuvwxyz"]
SHOWN = ["do cats like fish", "whales like water and grass"]
MANY = [f"{text}, {number}" for text in TEXTS for number in range(3)]


@pytest.fixture(scope="module")
def index() -> SentenceTransformer:
    model: Any = load_model(cut_layers(fetch(MINILM), 1))[0]
    return model


@pytest.fixture(scope="module")
def start(index: SentenceTransformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return asymmetric_student(fetch(STATIC_STUDENT), index, MANY, output=tmp_path_factory.mktemp("start") / "student")


def both(model: Any) -> list[np.ndarray]:
    return [np.asarray(model.encode_query(SHOWN)), np.asarray(model.encode_document(SHOWN))]


def test_queries_are_taken_to_the_documents_space(start: Path, index: SentenceTransformer) -> None:
    """Two encoders that were never together agree on nothing; the documents' side is the index's, to the last bit."""
    student: Any = load_model(start)[0]
    assert np.array_equal(both(student)[1], np.asarray(index.encode_document(SHOWN)))
    texts = MANY[::50]
    queries, documents = (np.asarray(side(texts)) for side in (student.encode_query, student.encode_document))
    assert np.allclose(np.linalg.norm(queries, axis=1), 1, atol=1e-5)
    assert (queries * documents).sum(axis=1).min() > 0.5, "a cosine of each text with itself"
    assert "potion-base-8M for queries" in (start / "README.md").read_text(encoding="utf-8")


def test_documents_stay_and_queries_learn(start: Path, dataset: DistillationDataset, tmp_path: Path) -> None:
    """An index of millions is not made again; dropout in the frozen side would teach noise."""
    before = both(load_model(start)[0])
    made = distill(start, dataset, freeze_documents=True, output_dir=tmp_path / "student")
    after = both(load_model(tmp_path / "student")[0])
    assert np.array_equal(before[1], after[1])
    assert not np.allclose(before[0], after[0], atol=1e-3)
    assert TrainingRecord.load(tmp_path / "student").arguments["freeze_documents"] is True
    assert made.record.identity["frozen"]
    assert "train" not in vars(made.student[0].sub_modules["document"])
    results = evaluate(tmp_path / "student", small_collection(), show_progress=False)
    assert results.ndcg_at_10 > evaluate(start, small_collection(), show_progress=False).ndcg_at_10
    again = distill(start, dataset, freeze_documents=True, output_dir=tmp_path / "student", resume=True)
    assert again.record.run == made.record.run
    with pytest.raises(FileExistsError, match="frozen"):  # the documents would be trained
        distill(start, dataset, output_dir=tmp_path / "student", resume=True)


def test_a_folder_is_read_without_this_package(start: Path) -> None:
    """Whoever uses the student has sentence-transformers, and nothing of ours."""
    script = (
        "import json, sys; from sentence_transformers import SentenceTransformer as S;"
        "m = S(sys.argv[1], device='cpu');"
        "t = ['do cats like fish', 'whales like water and grass'];"
        "print(json.dumps([m.encode_query(t).tolist(), m.encode_document(t).tolist(),"
        "sorted(n for n in sys.modules if n.startswith('st_wkl'))]))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(start)], capture_output=True, text=True, check=True)
    *vectors, ours = json.loads(done.stdout.splitlines()[-1])
    assert ours == []
    for there, here in zip(vectors, both(load_model(start)[0]), strict=True):
        assert np.allclose(there, here, atol=1e-6)


def test_a_transformer_embeds_queries(index: SentenceTransformer, dataset: DistillationDataset, tmp_path: Path) -> None:
    """With the gradient cache, which embeds documents that pass no gradient; both sides' prompts are kept."""
    small: Any = load_model(cut_layers(fetch(MINILM), [2]))[0]
    set_prompts(small, {"query": "query: "})
    start = asymmetric_student(small, index, MANY, output=tmp_path / "start")
    student: Any = load_model(start)[0]
    assert (student.prompts["query"], student.prompts["document"]) == ("query: ", "")
    before = both(student)
    distill(student, dataset, mini_batch_size=4, freeze_documents=True, output_dir=tmp_path / "student")
    after = both(load_model(tmp_path / "student")[0])
    assert np.array_equal(before[1], after[1])
    assert not np.array_equal(before[0], after[0])


def test_one_of_two_transformers_is_not_taken_for_both(index: SentenceTransformer) -> None:
    """An adapter or a cut would reach the first alone, and a setting of the second was no part of the identity."""
    other: Any = load_model(cut_layers(fetch(MINILM), [2]))[0]
    model = SentenceTransformer(modules=[Router.for_query_document(list(other), list(index))])
    with pytest.raises(ValueError, match=r"2 transformers.*an adapter would take the first alone"):
        check_config(model, True)
    with pytest.raises(ValueError, match=r"2 transformers.*cut_layers would take the first alone"):
        cut_layers(model, 1)
    config: Any = model[0].sub_modules["document"][0].auto_model.config
    known, value = identity(model), config.layer_norm_eps
    config.layer_norm_eps = 0.1
    assert identity(model) != known
    config.layer_norm_eps = value


def test_what_cannot_be_an_asymmetric_student(start: Path, index: SentenceTransformer, tmp_path: Path) -> None:
    """Each is told before anything is trained."""
    static = fetch(STATIC_STUDENT)
    with pytest.raises(FileExistsError, match="is not empty"):
        asymmetric_student(static, index, MANY, output=start)
    with pytest.raises(ValueError, match="2 different texts do not say how 256 dimensions"):
        asymmetric_student(static, index, ["a", "b", "a", " "], output=tmp_path / "new")
    with pytest.raises(ValueError, match="sides of its own"):
        asymmetric_student(static, start, MANY, output=tmp_path / "new")
    with pytest.raises(TypeError, match="no single embedding"):
        asymmetric_student(SparseEncoder(str(fetch(MINILM))), index, MANY, output=tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="one encoder for queries and another"), frozen_documents(index):
        pass
    with pytest.raises(ValueError, match="and save_dtype would not"):
        distill(start, None, freeze_documents=True, save_dtype="bfloat16", output_dir=tmp_path / "x")  # type: ignore[arg-type]


def test_the_command_freezes_documents(start: Path, dataset: DistillationDataset, tmp_path: Path) -> None:
    """A folder does not say what is frozen: without the option the index would be worth nothing afterwards."""
    lists = dataset.save(tmp_path / "lists")
    told = ("--student", start, "--freeze-documents", "--epochs", 1, "--quiet")
    code, _, error = st_wkl("train", lists, *told, "--output", tmp_path / "student")
    assert code == 0, error
    assert np.array_equal(both(load_model(start)[0])[1], both(load_model(tmp_path / "student")[0])[1])
