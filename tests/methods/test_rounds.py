"""Rounds of distillation: the student mines for itself, nothing is scored twice, and a killed run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sentence_transformers import CrossEncoder, SentenceTransformer, SentenceTransformerTrainer

from st_wkl.data.collator import ListwiseCollator
from st_wkl.data.pairwise import CrossEncoderPairwiseTeacher
from st_wkl.losses import PairDistillLoss
from st_wkl.methods.rounds import distill_rounds
from st_wkl.models import model_revision
from st_wkl.training import default_arguments
from tests.helpers.animals import WordOverlap, small_collection


def options(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    made = {"num_negatives": 4, "store": tmp_path / "scores.sqlite3", "show_progress": False, "against": None}
    return {"output_dir": tmp_path / "rounds", **made, **changes}


@pytest.mark.slow
def test_the_second_round_mines_with_the_first_rounds_student(static_student_path: Path, tmp_path: Path) -> None:
    """Two rounds over the same candidates would only be more epochs; and what is known must not be scored again."""
    teacher = WordOverlap()
    first, second = distill_rounds(static_student_path, small_collection(), teacher, **options(tmp_path))
    assert list(first.dataset.provenance["candidates"]["sources"]) == ["bm25"]
    assert list(second.dataset.provenance["candidates"]["sources"]) == ["dense:student"]
    assert first.dataset.train["document_ids"][:] != second.dataset.train["document_ids"][:]
    assert len(teacher.asked) == len(set(teacher.asked)), "each pair is scored once over all rounds"
    models = [SentenceTransformer(str(path)) for path in (static_student_path, first.student, second.student)]
    assert len({model_revision(model) for model in models}) == 3
    assert (tmp_path / "rounds" / "round-2" / "student" / "distillation.json").is_file()


def test_a_killed_run_goes_on_where_it_was(static_student_path: Path, tmp_path: Path) -> None:
    """Rounds take days: neither a finished round nor its scores may be lost, and half a student is no student."""
    calls: list[str] = []

    def train(student: Any, dataset: Any, folder: Path) -> None:
        calls.append(folder.parent.name)
        folder.mkdir()
        (folder / "half").touch()
        if len(calls) == 2:
            raise KeyboardInterrupt
        student.save_pretrained(str(folder))

    teacher = WordOverlap()
    with pytest.raises(KeyboardInterrupt):
        distill_rounds(static_student_path, small_collection(), teacher, train=train, **options(tmp_path))
    asked = len(teacher.asked)
    rounds = distill_rounds(static_student_path, small_collection(), teacher, train=train, **options(tmp_path))
    assert calls == ["round-1", "round-2", "round-2"]
    assert [part.reused for part in rounds] == [True, False]
    assert len(teacher.asked) == asked
    rounds = distill_rounds(static_student_path, small_collection(), teacher, train=train, **options(tmp_path))
    assert all(part.reused for part in rounds)
    assert len(calls) == 3
    assert not [path for path in (tmp_path / "rounds").rglob("*unfinished*")]


def test_rounds_of_other_settings_are_not_taken_for_these(static_student_path: Path, tmp_path: Path) -> None:
    """A folder from last week with another teacher would come back as the result of this one."""

    def train(student: Any, dataset: Any, folder: Path) -> None:
        student.save_pretrained(str(folder))

    arguments: dict[str, Any] = {"rounds": 1, "train": train}
    distill_rounds(static_student_path, small_collection(), WordOverlap(), **options(tmp_path, **arguments))
    for teacher, changes, what in (
        (WordOverlap("other"), {}, "teacher"),
        (WordOverlap(), {"num_negatives": 5}, "num_negatives"),
        (WordOverlap(), {"restart": True}, "round"),
        (WordOverlap(), {"pairwise": CrossEncoderPairwiseTeacher(WordOverlap())}, "preferences"),
    ):
        with pytest.raises(ValueError, match=f"was made with another {what}. Give another output_dir"):
            distill_rounds(
                static_student_path, small_collection(), teacher, **options(tmp_path, **{**arguments, **changes})
            )


def test_pair_distill_in_two_rounds(static_student_path: Path, tmp_path: Path) -> None:
    """The published recipe in one call: pairs of both rounds, and the loss that reads them."""

    def train(student: Any, dataset: Any, folder: Path) -> None:
        args = default_arguments(student, folder / "run")
        args.num_train_epochs, args.disable_tqdm = 1, True
        data, loss, collator = dataset.to_lists(), PairDistillLoss(student), ListwiseCollator(student)
        SentenceTransformerTrainer(student, args, data, loss=loss, data_collator=collator).train()
        student.save_pretrained(str(folder))

    teacher = WordOverlap()
    pairwise = CrossEncoderPairwiseTeacher(teacher)
    rounds = distill_rounds(
        static_student_path, small_collection(), teacher, **options(tmp_path, train=train, pairwise=pairwise)
    )
    assert all(part.dataset.provenance["preferences"]["pairs"] > 0 for part in rounds)
    assert len(teacher.asked) == len(set(teacher.asked)), "preferences come from scores that are there already"


def test_students_that_cannot_search_are_refused(tiny_bert_path: Path, tmp_path: Path) -> None:
    """Before hours of scoring and training, not after the first round."""
    student: Any = CrossEncoder(str(tiny_bert_path))
    with pytest.raises(TypeError, match="CrossEncoder cannot search a collection"):
        distill_rounds(student, small_collection(), WordOverlap(), **options(tmp_path))
    with pytest.raises(ValueError, match="rounds must be 1 or more"):
        distill_rounds(student, small_collection(), WordOverlap(), **options(tmp_path, rounds=0))
    assert not (tmp_path / "rounds").exists()
