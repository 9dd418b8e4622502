"""Candidates and ranks that follow the student: what is mined, what is scored, and what a resumed run sees."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import (
    CrossEncoder,
    MultiVectorEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from transformers import TrainerCallback

from st_wkl import DistillationDatasetBuilder, ListwiseCollator, WeightedKLDistillationLoss, distill
from st_wkl.data.dense import retriever_candidates
from st_wkl.data.pairwise import CrossEncoderPairwiseTeacher
from st_wkl.functional import weighted_kl
from st_wkl.losses import PairDistillLoss
from st_wkl.losses.lists import unpack
from st_wkl.training.refresh import RefreshCandidatesCallback, student_ranks_in
from tests.helpers.animals import WordOverlap, small_collection
from tests.helpers.processes import run_module
from tests.helpers.students import features_and_labels, listwise_batch, make_student, one_score, ragged_rows


def builder(tmp_path: Path, **options: Any) -> DistillationDatasetBuilder:
    options = {"num_negatives": 4, "store": tmp_path / "scores.sqlite3", "teacher": WordOverlap(), **options}
    return DistillationDatasetBuilder(small_collection(), **options)


class Stop(TrainerCallback):
    """Stop after a step, as a killed run does, right after its checkpoint."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.at


def train(
    path: Path, folder: Path, refresh: RefreshCandidatesCallback, *, stop: int | None = None, **options: Any
) -> Any:
    """Train for 7 steps of 2 epochs (40 rows, batches of 12), a checkpoint after each."""
    student = SentenceTransformer(str(path))
    resume = options.pop("resume", None)
    args = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=12,
        max_steps=7,
        learning_rate=1.0,  # so that every refresh finds other candidates, in so few steps
        report_to="none",
        save_steps=1,
        logging_steps=100,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options.pop("arguments", {}),
    )
    loss = options.pop("loss", WeightedKLDistillationLoss)(student, **options)
    trainer = SentenceTransformerTrainer(
        student,
        args,
        refresh.train_dataset,
        loss=loss,
        data_collator=ListwiseCollator(student),
        callbacks=[refresh, *([Stop(stop)] if stop else [])],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def undisturbed(static_student_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    folder = tmp_path_factory.mktemp("undisturbed")
    made = builder(folder)
    refresh = RefreshCandidatesCallback(made, made.build(show_progress=False), every=2, ranks=True)
    return folder, refresh, train(static_student_path, folder / "run", refresh, ranks="dataset")


def test_the_student_proposes_and_the_teacher_scores_only_what_is_new(
    undisturbed: tuple[Path, Any, Any], static_student_path: Path
) -> None:
    """Refreshing with the old student, or scoring everything anew, would cost hours and teach nothing."""
    folder, refresh, _ = undisturbed
    assert [said["step"] for said in refresh.history] == [2, 4, 6]
    assert all(said["changed_lists"] > 0 for said in refresh.history)
    teacher = refresh.builder.teacher
    assert len(teacher.asked) == len(set(teacher.asked))
    # The lists of the last refresh are what the builder makes of the candidates of the student at that step.
    student = SentenceTransformer(str(folder / "run" / "checkpoint-6"))
    again = builder(folder, candidates=retriever_candidates(small_collection(), student, top_k=10))
    expected = again.build(show_progress=False).to_lists().to_list()
    rows = refresh.train_dataset[:]
    assert rows["documents"] == [row["documents"] for row in expected]
    assert rows["scores"] == [row["scores"] for row in expected]


@pytest.mark.parametrize("step", [3, 4, 5])
def test_a_resumed_run_ends_with_the_same_student(
    step: int, undisturbed: tuple[Path, Any, Any], static_student_path: Path, tmp_path: Path
) -> None:
    """Step 4 is a refresh of its own (the trainer had fetched one batch ahead of it), 5 is in the second epoch."""
    made = builder(tmp_path)
    dataset = made.build(show_progress=False)
    first = RefreshCandidatesCallback(made, dataset, every=2, ranks=True)
    train(static_student_path, tmp_path / "run", first, stop=step, ranks="dataset")
    second = RefreshCandidatesCallback(made, dataset, every=2, ranks=True)
    trainer = train(static_student_path, tmp_path / "run", second, ranks="dataset", resume=True)
    assert trainer.state.global_step == 7
    _, refresh, expected = undisturbed
    assert second.history == refresh.history
    for name, value in expected.model.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name]), name


def test_stale_batch_of_a_refresh_within_an_epoch(static_student_path: Path, tmp_path: Path) -> None:
    """As above with a refresh in the middle of an epoch, whose next batch an undisturbed run has already fetched."""
    made = builder(tmp_path)
    dataset = made.build(show_progress=False)

    def run(name: str, **options: Any) -> Any:
        refresh = RefreshCandidatesCallback(made, dataset, every=3)
        return train(static_student_path, tmp_path / name, refresh, **options)

    expected = run("whole")
    run("cut", stop=3)
    trainer = run("cut", resume=True)
    for name, value in expected.model.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name]), name


def test_ranks_are_those_of_the_mined_list(static_student_path: Path, tmp_path: Path) -> None:
    """The authors' ranks count in the mined list: a negative drawn from place 40 has rank 40, not 3."""
    student = SentenceTransformer(str(static_student_path))
    collection = small_collection()
    mined = retriever_candidates(collection, student, top_k=40, show_progress=False)
    made = builder(tmp_path, candidates=mined, num_negatives=3)
    refresh = RefreshCandidatesCallback(made, made.build(show_progress=False), candidates=False, ranks=True)
    before = refresh.train_dataset[:]["documents"]
    assert refresh.train_dataset[0]["ranks"] == [1] * 4
    refresh.refresh(student.train())
    assert student.training
    rows = refresh.train_dataset[:]
    assert rows["documents"] == before
    for query, documents, ranks in zip(rows["query"], rows["documents"], rows["ranks"], strict=True):
        query_id = next(key for key, text in collection.queries.items() if text == query)
        places = {collection.documents[hit.document_id]: hit.rank for hit in mined[query_id]}
        scores = {hit.rank: hit.score for hit in mined[query_id]}
        for document, rank in zip(documents, ranks, strict=True):
            assert scores[rank] == pytest.approx(scores[places[document]], abs=1e-5), "equal scores may swap"


def test_ranks_of_small_pools(static_student_path: Path) -> None:
    """A pool may be empty, and its order must not matter."""
    student = SentenceTransformer(str(static_student_path))
    documents = {"a": "cats purr", "b": "cats purr loudly", "c": "stock markets fell"}
    ranks = student_ranks_in(student, ["cats purr", "x"], [["c", "a", "b"], []], documents)
    assert ranks == [[3, 1, 2], []]
    assert student_ranks_in(student, [], [], documents) == []


def test_token_embeddings_rank_too(tiny_bert_path: Path) -> None:
    """Late interaction encodes to lists of matrices, not to one tensor."""
    student = MultiVectorEncoder(str(tiny_bert_path))
    documents = {"a": "cats", "b": "stock markets fell today", "c": "cats purr"}
    scores = student.similarity(student.encode_query(["cats purr"]), student.encode_document(list(documents.values())))
    expected = (-scores[0]).argsort().argsort() + 1
    assert student_ranks_in(student, ["cats purr", "x"], [["a", "b", "c"], []], documents) == [expected.tolist(), []]


def test_the_loss_uses_the_ranks_of_the_dataset(tiny_bert_path: Path) -> None:
    """Ranks that get lost on the way would leave the default in force, with a plausible loss."""
    model = make_student("dense", tiny_bert_path).double()
    rows = ragged_rows(4)
    for row in rows:
        row["ranks"] = [3 * place + 2 for place in range(len(row["documents"]))]
    batch = listwise_batch(model, "dense", rows)
    width = max(len(row["documents"]) for row in rows)

    def padded(values: list[list[float]], filler: float = 0.0) -> torch.Tensor:
        return torch.tensor([row + [filler] * (width - len(row)) for row in values], dtype=torch.float64)

    student = padded([[one_score(model, "dense", r["query"], d).item() for d in r["documents"]] for r in rows])
    expected = weighted_kl(
        student,
        padded([r["scores"] for r in rows]),
        padded([r["labels"] for r in rows]) >= 1,
        ranks=padded([[float(rank) for rank in r["ranks"]] for r in rows], 1.0),
        mask=padded([[1.0] * len(r["documents"]) for r in rows]) > 0,
        student_temperature=0.05,
    ).item()
    for options in ({}, {"mini_batch_size": 2}):
        loss = WeightedKLDistillationLoss(model, ranks="dataset", **options)
        assert loss(*batch).item() == pytest.approx(expected, rel=1e-6)
    assert WeightedKLDistillationLoss(model)(*batch).item() != pytest.approx(expected, rel=1e-3)
    assert loss.get_config_dict()["ranks"] == "dataset"
    skipping = WeightedKLDistillationLoss(model, ranks="dataset", without_positive="skip")
    assert skipping(*batch).isfinite()
    plain = listwise_batch(model, "dense", [{k: v for k, v in row.items() if k != "ranks"} for row in rows])
    assert unpack(plain[1]).ranks is None
    with pytest.raises(ValueError, match="needs lists with a column 'ranks'"):
        loss(*plain)
    with pytest.raises(ValueError, match="ranks must be 'student' or 'dataset'"):
        WeightedKLDistillationLoss(model, ranks="retriever")  # type: ignore[arg-type]
    for bad, message in (([0, *rows[0]["ranks"][1:]], "rank of document 0 .* is 0"), ([1], "lists of length")):
        with pytest.raises(ValueError, match=message):
            ListwiseCollator(model)([{**rows[0], "ranks": bad}])


def test_pairs_are_asked_again(static_student_path: Path, tmp_path: Path) -> None:
    """Preferences name places in the list; those of the old list would be about other documents."""
    teacher = WordOverlap()
    made = builder(tmp_path, teacher=teacher, pairwise=CrossEncoderPairwiseTeacher(teacher), pairs_per_query=3)
    refresh = RefreshCandidatesCallback(made, made.build(show_progress=False), every=2)
    before = refresh.train_dataset[:]["documents"]
    trainer = train(static_student_path, tmp_path / "run", refresh, loss=PairDistillLoss)
    after = refresh.train_dataset[:]
    assert after["documents"] != before
    for scores, pairs in zip(after["scores"], after["pairs"], strict=True):
        for i, j, probability in pairs:
            assert probability == pytest.approx(1 / (1 + math.exp(scores[j] - scores[i])), rel=1e-5)
    collated = features_and_labels(ListwiseCollator(trainer.model), [refresh.train_dataset[0]], "dense", trainer.model)[
        1
    ]
    preferences = unpack(collated).preferences
    assert preferences is not None
    assert int((~preferences.isnan()).sum()) == 3


def test_what_cannot_be_refreshed_says_so(
    static_student_path: Path, tiny_bert_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Before training: workers would go on with the old lists without a word, a reranker cannot search."""
    caplog.set_level(logging.INFO)
    made = builder(tmp_path)
    dataset = made.build(show_progress=False)
    with pytest.raises(ValueError, match="every must be 1 or more"):
        RefreshCandidatesCallback(made, dataset, every=0)
    with pytest.raises(ValueError, match="nothing to refresh"):
        RefreshCandidatesCallback(made, dataset, candidates=False)
    refresh = RefreshCandidatesCallback(made, dataset, every=2)
    with pytest.raises(ValueError, match="dataloader_num_workers=1: worker processes hold copies"):
        train(static_student_path, tmp_path / "run", refresh, arguments={"dataloader_num_workers": 1})
    args, state = SentenceTransformerTrainingArguments(output_dir=str(tmp_path)), type("State", (), {"global_step": 0})
    with pytest.raises(TypeError, match="CrossEncoder cannot search"):
        refresh.on_train_begin(args, state, None, model=CrossEncoder(str(tiny_bert_path)))  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="Resume from a checkpoint that was saved with this callback"):
        refresh.load(tmp_path)
    refresh.save(tmp_path, 0)
    other = builder(tmp_path, query_ids=["q0-1", "q0-2"])
    with pytest.raises(ValueError, match="belongs to another dataset"):
        RefreshCandidatesCallback(other, other.build(show_progress=False)).load(tmp_path)


def test_distill_takes_the_changing_lists(static_student_path: Path, tmp_path: Path) -> None:
    """One call has to serve here, too: it must see lists in rows that are only made when they are read."""
    made = builder(tmp_path)
    refresh = RefreshCandidatesCallback(made, made.build(show_progress=False), every=2)
    distill(static_student_path, refresh.train_dataset, output_dir=tmp_path / "student", callbacks=[refresh])
    assert [said["step"] for said in refresh.history] == [2, 4]


@pytest.mark.slow
def test_two_processes_renew_the_lists_of_one(static_student_path: Path, tmp_path: Path) -> None:
    """Only the first process mines; a process that kept its old lists would train another student, silently."""
    seen = {}
    for processes in (1, 2):
        output = tmp_path / str(processes)
        output.mkdir()
        run_module("tests.training.refresh_distributed", static_student_path, output, processes, processes=processes)
        found = [json.loads((output / f"seen-{rank}.json").read_text(encoding="utf-8")) for rank in range(processes)]
        seen[processes] = (found, load_file(output / "weights.safetensors"))
    (alone,), weights = seen[1]
    assert [said["step"] for said in alone["history"]] == [2, 4]
    assert any(said["changed_lists"] for said in alone["history"])
    for rank, found in enumerate(seen[2][0]):
        assert found["history"] == alone["history"], rank
        assert found["rows"] == alone["rows"], rank
    for name, value in weights.items():
        torch.testing.assert_close(value, seen[2][1][name], rtol=0, atol=1e-7, msg=name)
