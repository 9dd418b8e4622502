"""Students that learn a teacher's embeddings: from lists, from texts alone, by Python and by the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from st_wkl import EmbeddingDataset, distill, run
from st_wkl.cli import app
from st_wkl.config import RunConfig
from st_wkl.data.dataset import DistillationDataset
from st_wkl.data.texts import teacher_vectors
from st_wkl.data.vectors import VectorStore
from st_wkl.models import load_model, set_prompts
from st_wkl.record import Exposure
from tests.helpers.animals import small_collection
from tests.helpers.command import CliRunner
from tests.helpers.students import make_student
from tests.helpers.training import KillAt, Killed, arguments
from tests.helpers.vectors import Numbers

TEXTS = [
    f"a text about {word} and nothing else but {word} {number}"
    for word in ("cats", "rain", "money")
    for number in range(20)
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Vectors of tests are no vectors of the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "st_wkl" / "vectors"


def closeness(student: Any, teacher: Any) -> float:
    pair = [model.encode_document(TEXTS, normalize_embeddings=True) for model in (student, teacher)]
    return float((pair[0] * pair[1]).sum(axis=1).mean())


def test_texts_alone_teach(tmp_path: Path, static_student_path: Path, cache: Path) -> None:
    """A student that has lost its vectors finds them again, with its own prompts as encode puts them; all is kept."""
    teacher = SentenceTransformer(str(static_student_path))
    set_prompts(teacher, {"document": "passage: "})
    student = SentenceTransformer(str(static_student_path))
    with torch.no_grad():
        student[0].embedding.weight.copy_(
            torch.randn(student[0].embedding.weight.shape, generator=torch.Generator().manual_seed(0))
        )
    set_prompts(student, {"document": "passage: "})
    before = closeness(student, teacher)
    # The first two are tried before training, and one longer than what such a trial read had no vector.
    dataset = EmbeddingDataset.of([f"{TEXTS[0]} {'and so on ' * 20}", *TEXTS[1:]], ["which animal purrs"])
    args = arguments(student, tmp_path / "student", num_train_epochs=8)
    made = distill(student, dataset, args=args, embedding_teacher=teacher, output_dir=tmp_path / "student")
    assert before < 0.2
    assert closeness(load_model(tmp_path / "student")[0], teacher) > 0.9
    record = json.loads((tmp_path / "student" / "distillation.json").read_text())
    assert record["loss"] == "EmbeddingDistillLoss"
    assert record["loss_config"]["distance_metric"] == "cosine"
    assert record["teacher"]["weights"].startswith("blake2b:")
    assert record["dataset"]["counts"] == {"queries": 1, "documents": 60}
    assert len(Exposure.load(tmp_path / "student").queries) == 1  # type: ignore[union-attr]
    assert made.record.prompts == {"document": "passage: "}
    assert "Embedding" in (tmp_path / "student" / "README.md").read_text()
    assert len([*cache.glob("*/vectors.bin")]) == 2


@pytest.mark.parametrize("dimension", [32, 48, 20])
def test_a_killed_run_ends_with_the_same_weights(dimension: int, tmp_path: Path, tiny_bert_path: Path) -> None:
    """Vectors, projection and the order of texts are those of a run that was left alone, learned layers included."""
    dataset = EmbeddingDataset.of(TEXTS)
    vectors = teacher_vectors(Numbers(dimension), dataset, show_progress=False)

    def run(folder: str, callbacks: Any = (), resume: bool = True) -> Any:
        student = make_student("dense", tiny_bert_path)
        args = arguments(student, tmp_path / folder, save_steps=2, num_train_epochs=2, learning_rate=1e-3)
        return distill(
            student,
            dataset,
            args=args,
            embedding_teacher=vectors,
            output_dir=tmp_path / folder,
            callbacks=callbacks,
            resume=resume,
        )

    run("alone")
    with pytest.raises(Killed):
        run("killed", [KillAt(5)])
    run("killed")
    for file in ("model.safetensors", *(["projection.safetensors"] if dimension != 32 else [])):
        wanted, found = (load_file(tmp_path / folder / file) for folder in ("alone", "killed"))
        assert wanted.keys() == found.keys()
        assert all(torch.equal(wanted[name], found[name]) for name in wanted), file


def test_it_composes_with_lists(tmp_path: Path, tiny_bert_path: Path, dataset: DistillationDataset) -> None:
    """KL, contrast and embeddings from one dataset; what has no lists is refused before anything is trained."""
    student = make_student("dense", tiny_bert_path)
    args = arguments(student, tmp_path / "student")
    given: dict[str, Any] = {"embedding_teacher": Numbers(48)}
    made = distill(student, dataset, args=args, output_dir=tmp_path / "student", matryoshka=[16], **given)
    terms = {"WeightedKLDistillationLoss", "InBatchContrastiveLoss", "EmbeddingDistillLoss"}
    assert terms <= made.history[0].keys()
    assert "'teacher': 'numbers'" in str(made.record.loss_config)
    assert (tmp_path / "student" / "projection.safetensors").is_file()
    texts = EmbeddingDataset.of(TEXTS)
    for options, message in (
        ({"loss": "kl+embedding"}, "compares queries with documents, and these are texts without lists"),
        ({"negatives_per_step": 3}, "negatives_per_step draws from lists"),
    ):
        with pytest.raises(ValueError, match=message):
            distill(student, texts, output_dir=tmp_path / "none", **given, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="learns from a teacher's embeddings: name it"):
        distill(student, texts, output_dir=tmp_path / "none")
    some = teacher_vectors(Numbers(), EmbeddingDataset.of(TEXTS[1:]), show_progress=False)
    with pytest.raises(ValueError, match="numbers has no vector of the document 'a text about cats"):
        distill(student, texts, output_dir=tmp_path / "none", embedding_teacher=some)
    with pytest.raises(TypeError, match="has to see all texts before training"):
        distill(student, dataset.to_lists().to_iterable_dataset(), output_dir=tmp_path / "none", **given)


def test_texts_are_read_from_what_people_have(tmp_path: Path) -> None:
    """Lines, tables, collections: empty ones and copies are counted, null ones named, test queries never taken."""
    (tmp_path / "texts.txt").write_text("Cats purr.\n\nDogs bark.\nCats purr.\n", encoding="utf-8")
    with pytest.warns(UserWarning, match="1 empty texts and 1 that come again are left out"):
        found = EmbeddingDataset.load(tmp_path / "texts.txt")
    assert found.train["text"][:] == ["Cats purr.", "Dogs bark."]
    table = tmp_path / "texts.jsonl"
    table.write_text('{"title": "Cats", "text": "They purr."}\n{"title": null, "text": "Dogs."}\n', encoding="utf-8")
    assert EmbeddingDataset.load(table).documents["text"][:] == ["Cats They purr.", "Dogs."]
    table.write_text('{"text": "a"}\n{"text": null}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"texts.jsonl, line 2 has no text \(null\)"):
        EmbeddingDataset.load(table)
    with pytest.raises(ValueError, match="There is no column 'body'"):
        EmbeddingDataset.load(table, text="body")
    collection = small_collection()
    half = dict(list(collection.qrels["train"].items())[::2])  # in the fixture both splits judge the same queries
    collection = replace(collection, qrels={**collection.qrels, "train": half})
    made = EmbeddingDataset.load(collection)
    assert {*made.documents["text"]} == {text for text in collection.documents.values() if text.strip()}
    assert {*made.queries["text"]} == {collection.queries[key] for key in collection.qrels["train"]}
    for wrong, message in ((["a", None], "document 2 is None"), ([], "There are no texts"), ("abc", "is one text")):
        with pytest.raises(ValueError, match=message):
            EmbeddingDataset.of(wrong)


def test_one_option_of_the_command_line(tmp_path: Path, static_student_path: Path) -> None:
    """A file of texts and the name of a model are enough, and the second time nothing is computed again."""
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    command = [
        "train",
        str(tmp_path / "texts.txt"),
        "--student",
        str(static_student_path),
        "--output",
        str(tmp_path / "out"),
    ]
    command += ["--loss", "embedding", "--embedding-teacher", str(static_student_path), "--quiet"]
    for _ in range(2):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
    assert "The student is in" in done.output
    assert (tmp_path / "out" / "distillation.json").is_file()
    assert VectorStore().embed(str(static_student_path), {"document": TEXTS[:2]}, show_progress=False).name


def test_a_configuration_without_scores(tmp_path: Path, static_student_path: Path) -> None:
    """A run that nobody scores for searches no candidates; what would need scores is refused at once."""
    small_collection().save(tmp_path / "collection")
    tree: dict[str, Any] = {
        "output": str(tmp_path / "run"),
        "collection": {"source": str(tmp_path / "collection")},
        "teacher": None,
        "student": {"model": str(static_student_path)},
        "loss": {"embedding_teacher": str(static_student_path), "parameters": {"distance_metric": "relational"}},
        "training": {"num_train_epochs": 1, "per_device_train_batch_size": 8},
        "evaluation": None,
    }
    assert run(RunConfig.from_dict(tree), show_progress=False).done == ["train", "card"]
    assert run(RunConfig.from_dict(tree), show_progress=False).skipped == ["train", "card"]
    assert not (tmp_path / "run" / "dataset").exists()
    record = json.loads((tmp_path / "run" / "student" / "distillation.json").read_text())
    assert record["loss_config"]["distance_metric"] == "relational"
    assert record["dataset"]["collection"]["fingerprint"] == small_collection().fingerprint
    for loss in ({}, {"name": "kl+embedding", "embedding_teacher": "packaged:all-MiniLM-L6-v2"}):
        with pytest.raises(ValueError, match=r"teacher is missing: without scores, a loss\.embedding_teacher alone"):
            RunConfig.from_dict({**tree, "loss": loss})
