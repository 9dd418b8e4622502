"""What users have on their disks goes on loading and meaning the same: one artefact of every stored format, pinned.

The files in `formats/` were written by version 0.1.0 (`results-v1.json` by the code before schema version 2) and are
never written anew. A change that cannot read them, or reads something else, gives its format a number and a message.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from sentence_transformers import CrossEncoder, SentenceTransformer

from st_wkl import Collection, compare
from st_wkl.config import RunConfig
from st_wkl.data.builder import DistillationDatasetBuilder
from st_wkl.data.dataset import DistillationDataset
from st_wkl.data.dense import retriever_candidates
from st_wkl.data.embedding_teacher import EmbeddingTeacher
from st_wkl.data.pairwise import preferences
from st_wkl.data.runs import read_run
from st_wkl.data.score_store import ScoreStore
from st_wkl.data.teachers import CrossEncoderTeacher
from st_wkl.data.vectors import VectorStore
from st_wkl.evaluation.results import Results
from st_wkl.models import hash_weights, model_revision
from st_wkl.pipeline import run
from st_wkl.record import Exposure
from st_wkl.text import text_hash
from st_wkl.training import TrainingRecord, checkpoints, default_arguments, distill
from st_wkl.training.refresh import RefreshCandidatesCallback

FORMATS = Path(__file__).parent / "formats"
ANIMALS = FORMATS / "animals"
VECTORS = FORMATS / "vectors"
# Of names and bytes of all files, those of `animals` and `vectors`, which came later, apart.
CONTENTS = "3011e71d5bf8d711b4524c61098d6208"
CONTENTS_ANIMALS = "8fa40c17afe50764756258494c646ab9"
CONTENTS_VECTORS = "11f47755d81a0c005886c67197154759"
TEACHER = {
    "kind": "cross-encoder",
    "model": "teacher",
    "revision": "blake2b:2f82f4829be53ea5a42d9f4274f6e908",
    "backend": "torch",
    "dtype": "float32",
    "max_length": 16,
    "activation": "identity",
    "prompt": None,
}


def work_in_copy(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to work in, as the folder in which the artefacts were made."""
    copy = shutil.copytree(folder, tmp_path / folder.name)
    monkeypatch.chdir(copy)
    return copy


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """What a run and a store left behind."""
    return work_in_copy(FORMATS, tmp_path, monkeypatch)


def stored_pairs(collection: Collection, dataset: DistillationDataset) -> list[tuple[str, str]]:
    return [
        (collection.queries[row["query_id"]], collection.documents[document_id])
        for row in dataset.train
        for document_id in row["document_ids"]
    ]


def test_the_artefacts_are_those_of_their_time():
    """An artefact that is written anew by today's code pins nothing."""
    first, animals, vectors = (hashlib.blake2b(digest_size=16) for _ in range(3))
    for file in sorted(file for file in FORMATS.rglob("*") if file.is_file()):
        digest = animals if file.is_relative_to(ANIMALS) else vectors if file.is_relative_to(VECTORS) else first
        digest.update(file.relative_to(FORMATS).as_posix().encode() + file.read_bytes())
    assert first.hexdigest() == CONTENTS
    assert animals.hexdigest() == CONTENTS_ANIMALS
    assert vectors.hexdigest() == CONTENTS_VECTORS


def test_a_store_gives_the_scores_of_a_folder(home):
    """Weeks of a teacher's work are found again under the identity that today's code gives the same folder."""
    pairs = stored_pairs(Collection.load("collection"), DistillationDataset.load_from_disk("run/dataset"))
    stored = np.concatenate(DistillationDataset.load_from_disk("run/dataset").train["scores"])
    teacher = CrossEncoderTeacher("teacher", max_length=16, device="cpu")
    assert teacher.identity == TEACHER
    with ScoreStore("scores.sqlite3") as store:
        assert store.info().teachers == [(TEACHER, 31)]
        np.testing.assert_array_equal(store.get(teacher.identity, pairs), stored.astype(np.float32))
    np.testing.assert_allclose(teacher.score(pairs), stored, atol=1e-5)


def test_a_store_gives_the_scores_of_a_hub_id(tmp_path, monkeypatch):
    """The identity of a repository is its id and commit."""
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--somebody--teacher"
    shutil.copytree(FORMATS / "teacher", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    teacher = CrossEncoderTeacher("somebody/teacher", max_length=16, device="cpu")
    assert teacher.identity == {**TEACHER, "model": "somebody/teacher", "revision": commit}


def test_stored_vectors_are_found_again(tmp_path):
    """Weeks of a teacher's work are found again under the identity that today's code gives the same folder."""
    store = VectorStore(shutil.copytree(VECTORS, tmp_path / "vectors"))
    teacher = EmbeddingTeacher(FORMATS / "student-start")
    embed, teacher.embed = teacher.embed, None
    texts = ["Cats purr.", "Dogs bark.", "Grüße"]
    found = store.embed(teacher, {"document": texts}, show_progress=False)
    np.testing.assert_allclose(found.of(texts, "document"), embed(texts, "document"), atol=1e-6)


def test_exported_scores_are_imported(home):
    """An export is how scores travel; it has to fit into every later store."""
    pairs = stored_pairs(Collection.load("collection"), DistillationDataset.load_from_disk("run/dataset"))
    with ScoreStore(":memory:") as new, ScoreStore("scores.sqlite3") as old:
        new.import_parquet("scores.parquet", show_progress=False)
        np.testing.assert_array_equal(new.get(TEACHER, pairs), old.get(TEACHER, pairs))


def test_collection_and_texts_keep_their_hashes():
    """Scores, exposure and caches hang on these."""
    assert Collection.load(FORMATS / "collection").fingerprint == "c2058303abdec4758b8316e56956f376"
    assert text_hash("Naïve  Bayes' RULES: 3.5 km") == "fe736ec5222e6310"
    assert text_hash("北京 の") == "ac3216e6e867ab5d"


def test_a_dataset_folder_loads():
    """Lists, gains, provenance and the fingerprint by which a run is resumed."""
    dataset = DistillationDataset.load_from_disk(FORMATS / "run" / "dataset")
    assert (len(dataset.train), len(dataset.queries), len(dataset.documents)) == (8, 8, 11)
    assert dataset.train[0]["query_id"] == "q0"
    assert dataset.train[0]["document_ids"] == ["d0", "d1", "d3", "d7"]
    assert dataset.train[0]["labels"] == [2, 0, 0, 0]
    assert dataset.provenance["teacher"] == TEACHER
    assert checkpoints.dataset_fingerprint(dataset) == "a30c92b548fe037102dacc039af1d146"


@pytest.mark.parametrize("file", ["results-v1.json", "run/results/before.json", "run/results/after.json"])
def test_results_load(file):
    """Results of both schema versions, and what they can be compared with."""
    results = Results.load(FORMATS / file)
    task = results.task()
    assert (task.task, task.split, task.ndcg_at_10) == ("collection", "test", 1.0)
    assert task.per_query == {"q8": 1.0, "q9": 1.0, "q10": 1.0, "q11": 1.0}
    assert results.model["revision"] == (
        "75c41ef0dbb5bb4c93dc194bfcf81d66b8142bee"
        if file.endswith("after.json")
        else "21b3e8bbe48779f8833cdf1fa2d4c9ed843f41ee"
    )
    assert compare(results, Results.load(FORMATS / "run" / "results" / "after.json")).ties == 4


def test_a_student_knows_how_it_was_made():
    """Record and hashes of the training texts travel with a student for good."""
    student = FORMATS / "run" / "student"
    record = TrainingRecord.load(student)
    assert (record.student, record.loss, record.run) == (
        "student-start",
        "WeightedSumLoss",
        "e138188ce2fde9b403d67a3a17bd7c66",
    )
    assert record.teacher == TEACHER
    assert record.arguments["learning_rate"] == 0.1
    exposure = Exposure.load(student)
    assert exposure == Exposure.of(DistillationDataset.load_from_disk(FORMATS / "run" / "dataset"))
    assert len(exposure.queries) == len(exposure.positives) == 8


def test_models_keep_their_hashes():
    """Results and cards know their model by them."""
    student = SentenceTransformer(str(FORMATS / "student-start"), device="cpu")
    teacher = CrossEncoder(str(FORMATS / "teacher"), device="cpu")
    assert hash_weights(student) == "fc1b1e32d88ac95ec17c0d8541c9a446"
    assert hash_weights(teacher) == "de4f02e19ca4593c1f8c7822f367b053"
    assert model_revision(student) == "21b3e8bbe48779f8833cdf1fa2d4c9ed843f41ee"


def test_a_complete_run_is_complete(home):
    """A run's markers mean what they meant: nothing is scored, trained or evaluated again."""
    config = RunConfig.load("run/config.yaml")
    found = read_run("run/candidates.trec.gz")
    assert [hit.document_id for hit in found["q0"]][:2] == ["d0", "d12"]
    before = {file: file.read_bytes() for file in Path("run").rglob("*") if file.suffix in (".safetensors", ".parquet")}
    result = run(config, show_progress=False)
    assert result.done == []
    assert result.skipped == ["candidates", "dataset", "train", "before", "after", "card"]
    assert {file: file.read_bytes() for file in before} == before


def test_a_stopped_training_of_format_1_is_not_taken_for_another(home):
    """Format 1 wrote down too little to tell two runs apart: it is refused by name, neither resumed nor overwritten."""
    dataset = DistillationDataset.load_from_disk("run/dataset")
    args = default_arguments(SentenceTransformer("student-start"), "stopped", per_device_train_batch_size=2)
    with pytest.raises(ValueError, match="another version of st-wkl"):
        distill("student-start", dataset, "kl", args, output_dir="stopped", resume=True)
    assert Path("stopped/checkpoints/run.json").read_bytes() == (FORMATS / "stopped/checkpoints/run.json").read_bytes()


@pytest.fixture
def animals(tmp_path, monkeypatch) -> Path:
    """What a run with several sources, a pairwise teacher and a refresh left behind."""
    return work_in_copy(ANIMALS, tmp_path, monkeypatch)


def test_answers_of_a_pairwise_teacher_are_found_again(animals):
    """They cost twice a pointwise teacher's work, and are kept under the teacher's own identity."""

    class Judge:
        identity: ClassVar = {"kind": "my-judge", "version": 1}

        def prefer(self, *_):
            pytest.fail("asked again")

    documents, scores = ["dogs bark loudly", "cats eat loudly"], [np.array([2.0, 1.0])]
    with ScoreStore("scores.sqlite3") as store:
        _, asked = preferences(Judge(), [("do dogs bark", documents)], scores, store=store, show_progress=False)
        assert asked.tolist() == [0.75]
        found = store.get(
            {**TEACHER, "model": "someone/reranker", "revision": "0" * 40, "max_length": 512},
            [("do dogs bark", "dogs bark loudly"), ("do dogs bark", ""), ("do dogs", "")],
        )
        np.testing.assert_array_equal(found, np.array([3.25, -7.5, np.nan], np.float32))


def test_a_dataset_with_preferences_loads():
    """Which pairs were compared, and with what outcome."""
    dataset = DistillationDataset.load_from_disk(ANIMALS / "preferences")
    lists = dataset.to_lists()
    assert checkpoints.dataset_fingerprint(dataset) == "fcb5763851ab36feadde47c3a3fe1d26"
    assert dataset.provenance["preferences"]["pairs"] == sum(map(len, lists["pairs"])) > 0
    assert checkpoints.dataset_fingerprint(DistillationDataset.load_from_disk(ANIMALS / "dataset")) == (
        "b12194940db208730d6ad0b200f8cb5a"
    )


def test_a_plain_run_file_gives_the_scores_that_were_written():
    """Scores to the last digit: a tie that is broken another way is another list."""
    found = read_run(ANIMALS / "bm25.trec", Collection.load(ANIMALS / "animals"))
    assert [(hit.document_id, hit.score, hit.source) for hit in found["q2"]] == [
        ("d2", 1.202491044998169, "bm25"),
        ("d5", 0.49299106001853943, "bm25"),
    ]


def test_embeddings_of_a_corpus_are_found_again(animals, monkeypatch):
    """Hours of a GPU, kept under the identity of the model and of the texts."""
    monkeypatch.setattr(SentenceTransformer, "encode_document", lambda *_, **__: pytest.fail("embedded again"))
    found = retriever_candidates(
        Collection.load("animals"), "student", ["q4"], top_k=1, cache="embeddings", show_progress=False
    )
    assert [hit.document_id for hit in found["q4"]] == ["d4"]


def test_lists_of_a_refresh_are_resumed(animals):
    """They lie in checkpoints, beside the trainer's own files."""
    collection, teacher = Collection.load("animals"), CrossEncoderTeacher("teacher", max_length=16, device="cpu")
    builder = DistillationDatasetBuilder(collection, teacher, candidates={})
    callback = RefreshCandidatesCallback(builder, DistillationDataset.load_from_disk("dataset"))
    callback.load(Path())
    row = callback.train_dataset[1]
    assert row["documents"] == [collection.documents[key] for key in ("d2", "d5", "d4")]
    assert row["scores"] == [0.7602832317352295, 1.5362545251846313, 0.024837732315063477]
