"""What distill() costs beside a hand-written script on the stock trainer, with the same loss, data and arguments.

Run: python examples/benchmark_overhead.py [--repeats 3] [--lists 256] [--student static|transformer]

Both ways train the same student on the same lists, log as often and save as many checkpoints and the student. distill()
also hashes student and dataset, tries the loss, watches the student's agreement with the teacher and writes card, plot
and record. Repeats are interleaved, and CPU seconds are compared as well as wall-clock seconds. On a busy machine
neither settles within a percent, so what distill() adds is also timed by itself: once, before and after training, and
in the trainer's loop, at its log lines. Imports, matplotlib's above all, are paid before.
The student and the text (SQuAD's paragraphs) come from the package index; the scores are random.
"""

import argparse
import contextlib
import io
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from transformers import TrainerCallback

from st_wkl import ListwiseCollator, WeightedKLDistillationLoss, distill
from st_wkl.data.dataset import DistillationDataset, features
from st_wkl.demo import squad_articles
from st_wkl.packaged import MINILM, SQUAD, STATIC_STUDENT, fetch
from st_wkl.training import default_arguments
from st_wkl.training.logs import TeacherAgreementCallback

DOCUMENTS = 8


def random_lists(count: int) -> DistillationDataset:
    """Real questions and paragraphs with random scores, which cost what real ones do."""
    draw = random.Random(0)
    articles = squad_articles(fetch(SQUAD) / "dev-v1.1.json")
    documents = {f"p{number}": text for number, (text, _) in enumerate(articles)}
    answers = [(question, f"p{number}") for number, (_, questions) in enumerate(articles) for question in questions]
    rows: dict[str, list] = {"query_id": [], "document_ids": [], "scores": [], "labels": []}
    chosen = draw.sample(answers, count)
    for number, (_, answer) in enumerate(chosen):
        others = [key for key in draw.sample(sorted(documents), DOCUMENTS) if key != answer][: DOCUMENTS - 1]
        rows["query_id"].append(f"q{number}")
        rows["document_ids"].append([answer, *others])
        rows["scores"].append([draw.uniform(-8, 8) for _ in range(DOCUMENTS)])
        rows["labels"].append([1] + [0] * (DOCUMENTS - 1))
    used = sorted({key for ids in rows["document_ids"] for key in ids})
    tables = {
        "train": rows,
        "queries": {"query_id": rows["query_id"], "text": [question for question, _ in chosen]},
        "documents": {"document_id": used, "text": [documents[key] for key in used]},
    }
    made = {name: Dataset.from_dict(values, features=features(name)) for name, values in tables.items()}
    return DistillationDataset(**made, provenance={"num_negatives": DOCUMENTS - 1})


def arguments(student: SentenceTransformer, folder: Path, epochs: float) -> object:
    args = default_arguments(student, folder)
    args.num_train_epochs, args.disable_tqdm = epochs, True
    return args


def now() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


def since(start: tuple[float, float]) -> tuple[float, float]:
    return time.process_time() - start[0], time.perf_counter() - start[1]


class Steps(TrainerCallback):
    """CPU and wall-clock seconds of the trainer's loop: steps, logs and checkpoints."""

    def on_train_begin(self, *_: object, **__: object) -> None:  # noqa: D102
        self.begun = now()

    def on_train_end(self, *_: object, **__: object) -> None:  # noqa: D102
        self.seconds = since(self.begun)


def stock(path: str, dataset: DistillationDataset, folder: Path, options: argparse.Namespace, epochs: float) -> Steps:
    """What one writes by hand."""
    steps, student = Steps(), SentenceTransformer(path)
    SentenceTransformerTrainer(
        student,
        arguments(student, folder / "checkpoints", epochs),
        dataset.to_lists(),
        loss=WeightedKLDistillationLoss(student, mini_batch_size=options.mini_batch_size),
        data_collator=ListwiseCollator(student),
        callbacks=[steps],
    ).train()
    student.save_pretrained(str(folder / "student"))
    return steps


def ours(path: str, dataset: DistillationDataset, folder: Path, options: argparse.Namespace, epochs: float) -> Steps:
    steps, student = Steps(), SentenceTransformer(path)
    loss = WeightedKLDistillationLoss(student, mini_batch_size=options.mini_batch_size)
    args = arguments(student, folder, epochs)
    distill(student, dataset, loss, args, output_dir=folder / "student", callbacks=[steps])
    return steps


@contextlib.contextmanager
def timed_additions() -> Iterator[list[tuple[float, float]]]:
    """Time the only code that distill() adds to the trainer's loop."""
    spent: list[tuple[float, float]] = []

    def timed(method: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> None:
            begun = now()
            method(*args, **kwargs)
            spent.append(since(begun))

        return call

    names = ("on_log", "_note")
    with contextlib.ExitStack() as stack:
        for name in names:
            method = timed(getattr(TeacherAgreementCallback, name))
            stack.enter_context(mock.patch.object(TeacherAgreementCallback, name, method))
        yield spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--lists", type=int, default=256)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--student", choices=["static", "transformer"], default="transformer")
    options = parser.parse_args()
    packaged, options.mini_batch_size = (STATIC_STUDENT, None) if options.student == "static" else (MINILM, 32)
    path, dataset = str(fetch(packaged)), random_lists(options.lists)
    # Of each repeat: the whole, the trainer's loop, and what distill() adds to the loop, in CPU and wall-clock seconds.
    times: dict[str, list[tuple]] = {"stock": [], "distill": []}
    for repeat in range(options.repeats + 1):
        # The first round pays for imports and page faults. The order turns round each time.
        for name, way in sorted({"stock": stock, "distill": ours}.items(), reverse=bool(repeat % 2)):
            with (
                tempfile.TemporaryDirectory() as folder,
                timed_additions() as added,
                contextlib.redirect_stdout(io.StringIO()),
            ):
                begun = now()
                steps = way(path, dataset, Path(folder), options, options.epochs if repeat else options.epochs / 10)
                whole = since(begun)
            if repeat:
                times[name].append((whole, steps.seconds, tuple(map(sum, zip((0.0, 0.0), *added, strict=True)))))
                print(f"{repeat} {name:8} {whole[0]:8.2f} CPU seconds {whole[1]:8.2f} seconds", flush=True)
    for unit, name in enumerate(("CPU seconds", "seconds")):
        report(name, *([[part[unit] for part in run] for run in times[way]] for way in ("stock", "distill")))


def report(unit: str, stock: list[list[float]], distill: list[list[float]]) -> None:
    by_clock = statistics.median(b[0] / a[0] for a, b in zip(stock, distill, strict=True))
    beside = [statistics.median(whole - steps for whole, steps, _ in runs) for runs in (stock, distill)]
    inside, steps = (statistics.median(run[place] for run in distill) for place in (2, 1))
    once = beside[1] - beside[0]
    print(f"{unit}: distill / stock = {by_clock:.4f} by the clock (median of {len(stock)})")
    print(f"  distill() adds {once:.2f} once, and {inside:.3f} to the {steps - inside:.1f} of the trainer's loop:")
    print(f"  loop {1 + inside / (steps - inside):.4f}, whole {1 + (once + inside) / (steps - inside + beside[0]):.4f}")


if __name__ == "__main__":
    main()
