"""Distillation in rounds: the student of one round finds the candidates of the next."""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sentence_transformers import CrossEncoder

from st_wkl.data.builder import DistillationDatasetBuilder
from st_wkl.data.collection import Collection
from st_wkl.data.dataset import DistillationDataset
from st_wkl.files import content_hash, sync, sync_tree
from st_wkl.models import is_trusted, load_model, model_revision
from st_wkl.ranges import check_options
from st_wkl.training.distillation import distill
from st_wkl.training.refresh import Retriever

if TYPE_CHECKING:
    from st_wkl.data.lists import ListTeacher
    from st_wkl.data.teacher import Teacher

logger = logging.getLogger(__name__)

Train = Callable[[Retriever, DistillationDataset, Path], object]


@dataclass(frozen=True)
class Round:
    """One round of `distill_rounds`.

    Args:
        number: Counts from 1.
        dataset: What the student was trained on.
        student: Folder of the trained student.
        reused: Whether the round was complete already, so that nothing was done.
    """

    number: int
    dataset: DistillationDataset
    student: Path
    reused: bool


def distill_rounds(
    student: str | Path | Retriever,
    collection: Collection | str | Path,
    teacher: Teacher | ListTeacher | str | Path,
    *,
    output_dir: str | Path,
    rounds: int = 2,
    restart: bool = False,
    train: Train | None = None,
    show_progress: bool = True,
    trust_remote_code: bool = False,
    **builder_options: Any,
) -> list[Round]:
    """Mine, score and train, then mine again with the new student, score what is new, and train again.

    The first round takes the candidates that the builder is given, BM25's by default; every further round takes those
    that the student of the round before finds, which are the documents that it still mistakes for relevant. Scores are
    kept in the builder's store, so a later round only pays for pairs that no round has met.

    `output_dir/round-1`, `round-2`, … each hold `dataset` and `student`. A part that is complete is not made again: a
    run that was killed continues with the part that it was at.

    Args:
        student: The student, or its Hub id or folder: any retriever, as it has to search the collection.
        collection: What `DistillationDatasetBuilder` takes.
        teacher: What `DistillationDatasetBuilder` takes.
        output_dir: Folder of the rounds.
        rounds: How many; 2 is what is published.
        restart: Train each round from the given student, not from that of the round before.
        train: `train(student, dataset, folder)` trains and saves a student to a folder, which does not exist yet.
            Default: `distill(student, dataset, output_dir=folder)`. A change of it is not noticed: take another
            `output_dir`.
        show_progress: Show bars of mining and scoring.
        trust_remote_code: Run code of the student's repository, whenever it is loaded. Only for repositories that you
            have read.
        **builder_options: `candidates`, `num_negatives`, `pairwise`, `store`, `selection`, … of the builder.

    Returns:
        The rounds, the last of which holds the student that was asked for.

    Raises:
        TypeError: If the student is a cross-encoder, so that it cannot mine.
        ValueError: If `rounds` is below 1, or `output_dir` holds rounds of other settings.

    Source:
        PairDistill, EMNLP 2024, https://arxiv.org/abs/2410.01383, repeats itself with the new student as retriever;
        speculative distillation (https://arxiv.org/abs/2410.11325) lets the student propose, too.

    Example:
        >>> rounds = distill_rounds(student, "mteb/nfcorpus", teacher, output_dir="rounds")  # doctest: +SKIP
        >>> SentenceTransformer(str(rounds[-1].student))  # doctest: +SKIP
    """
    check_options(rounds=rounds)
    output_dir = Path(output_dir).expanduser()
    first, name = load_model(student, trust_remote_code=trust_remote_code)
    trusted = is_trusted(first, trust_remote_code)
    if isinstance(first, CrossEncoder):
        raise TypeError("A CrossEncoder cannot search a collection, so it finds no candidates for a round.")

    def by_default(student: Retriever, dataset: DistillationDataset, folder: Path) -> object:
        return distill(student, dataset, output_dir=folder, base_name=name)

    builder = DistillationDatasetBuilder(collection, teacher, **builder_options)
    said = {"start": model_revision(first), "restart": restart, "queries": content_hash(builder.query_ids, size=16)}
    done: list[Round] = []
    for number in range(1, rounds + 1):
        folder = output_dir / f"round-{number}"
        made = {**said, "number": number}
        dataset_ready = (folder / "dataset").is_dir()
        if dataset_ready:
            dataset = DistillationDataset.load(folder / "dataset")
            _check_same(dataset, builder, made, folder)
        else:
            if number > 1:
                # By its folder, after which the candidates' source is called.
                options: dict[str, Any] = {"show_progress": show_progress, "trust_remote_code": trusted}
                builder.candidates = builder.find_candidates(done[-1].student, **options)
            dataset = builder.build(show_progress=show_progress)
            dataset.provenance["round"] = made
            dataset.save(folder / "dataset")
        reused = dataset_ready and (folder / "student").is_dir()
        if not reused:
            # Training changes the model that it is given; the first one is needed again where rounds restart.
            again = restart or number == 1
            model: Any = copy.deepcopy(first) if again else load_model(done[-1].student, trust_remote_code=trusted)[0]
            unfinished = folder / ".student.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
            (train or by_default)(model, dataset, unfinished)
            sync_tree(unfinished)
            os.replace(unfinished, folder / "student")
            sync(folder)
        logger.info("round %d: %s", number, "complete before" if reused else f"trained on {len(dataset):,} lists")
        done.append(Round(number, dataset, folder / "student", reused))
    return done


def _check_same(
    dataset: DistillationDataset, builder: DistillationDatasetBuilder, made: dict[str, Any], folder: Path
) -> None:
    """Refuse to go on with the rounds of other settings, which would look like results of these."""
    expected: dict[str, Any] = {
        "collection": {"name": builder.collection.name, "fingerprint": builder.collection.fingerprint},
        "split": builder.split,
        "num_negatives": builder.num_negatives,
        "selection": builder.selection.to_dict(),
        "teacher": builder.teacher.identity,
        "round": made,
    }
    if builder.pairwise is not None:
        there = dataset.provenance.get("preferences") or {}
        expected["preferences"] = {**there, "teacher": builder.pairwise.identity}
    plain = json.loads(json.dumps(expected))  # as it reads back from a file: tuples are lists there
    if changed := [name for name, value in plain.items() if dataset.provenance.get(name) != value]:
        raise ValueError(
            f"{folder} was made with another {', '.join(changed)}. Give another output_dir, or delete this one if its "
            "rounds may go."
        )
