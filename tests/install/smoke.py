"""What an installed st-wkl has to be able to do: losses, a build, LoRA and its merge, evaluation, card, MTEB's entry.

Run: python -I tests/install/smoke.py    (in an environment that the wheel is installed in; two minutes, no Hub)

`tests/install/job.py` makes such environments. Nothing of the checkout is imported, so what the wheel leaves out or
does not declare is missed here.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # what needs the Hub has no place in here

import numpy as np
import sentence_transformers
import torch

import st_wkl
from st_wkl import Collection, CrossEncoderTeacher, DistillationDatasetBuilder, compare, distill, evaluate
from st_wkl.packaged import CROSS_ENCODER, MINILM, STATIC_STUDENT, fetch
from st_wkl.publish.leaderboard import prepare
from st_wkl.training import LOSSES, default_arguments
from st_wkl.training.lora import merge

CLASSES = ("SentenceTransformer", "SparseEncoder", "MultiVectorEncoder", "CrossEncoder")
CONFIG = """\
format: 1
output: run
collection: {source: animals, limit: 16}
candidates: {num_negatives: 3}
teacher: {model: "packaged:ms-marco-MiniLM-L12-v2", store: scores.sqlite3}
student: {model: "packaged:all-MiniLM-L6-v2"}
training: {max_steps: 2, per_device_train_batch_size: 8, use_cpu: true}
lora: {r: 4, target_modules: [query, value]}
"""


def animals() -> Collection:
    """Write a BEIR folder of 40 documents and a query about each, and load it."""
    subjects = ["cats", "dogs", "birds", "whales", "snakes", "horses", "wolves", "frogs"]
    facts = ["like water", *(f"like {what} and water" for what in ("grass", "meat", "fish", "fruit"))]
    texts = [f"{subject} {fact}" for subject in subjects for fact in facts]
    folder = Path("animals")
    (folder / "qrels").mkdir(parents=True)
    for file, start in (("corpus", ""), ("queries", "do ")):
        lines = [json.dumps({"_id": str(place), "text": start + text}) for place, text in enumerate(texts)]
        (folder / f"{file}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    judged = "\n".join(["query-id\tcorpus-id\tscore", *(f"{place}\t{place}\t1" for place in range(len(texts)))])
    for split in ("train", "test"):
        (folder / "qrels" / f"{split}.tsv").write_text(judged, encoding="utf-8")
    return Collection.load(folder)


def trained(
    student: object, dataset: object, folder: str, loss: str | None = None, lora: bool = False, **options: object
) -> Path:
    """Train two steps and return the student's folder."""
    loaded = sentence_transformers.SentenceTransformer(str(student)) if isinstance(student, str | Path) else student
    args = default_arguments(loaded, folder, lora=lora, per_device_train_batch_size=8, max_steps=2, use_cpu=True)
    return distill(loaded, dataset, loss, args, output_dir=folder, lora=lora, **options).folder


def losses(dataset: object) -> None:
    """Train with every loss that has a name, and every class of students."""
    static, minilm = fetch(STATIC_STUDENT), fetch(MINILM)
    for name in LOSSES:
        options = {"embedding_teacher": minilm} if name == "embedding" else {}
        trained(static, dataset, f"loss-{name}", name, **options)
    for name in CLASSES:
        options = {"num_labels": 1} if name == "CrossEncoder" else {}
        folder = trained(getattr(sentence_transformers, name)(str(minilm), **options), dataset, f"class-{name}")
        st_wkl.models.load_model(folder)


def adapter(dataset: object) -> Path:
    """Train an adapter, load it again, merge it, and return the merged student's folder."""
    texts = ["do cats like water", "whales like fish and water"]
    folder = trained(fetch(MINILM), dataset, "adapter", lora=True)
    merged = merge(folder, "merged")
    before, loaded, plain = (
        sentence_transformers.SentenceTransformer(str(path)).encode(texts) for path in (fetch(MINILM), folder, merged)
    )
    assert not np.allclose(before, loaded, atol=1e-5), "training has not moved the adapter"
    assert np.allclose(loaded, plain, atol=1e-5), "merging has changed the student"
    return merged


def command(*words: str) -> None:
    """Run one command of `st-wkl`."""
    subprocess.run([sys.executable, "-I", "-m", "st_wkl", *words, "--quiet"], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    """Do all of it in a folder that is thrown away."""
    assert Path(st_wkl.__file__).is_relative_to(sys.prefix), f"this is not the wheel: {st_wkl.__file__}"
    torch.manual_seed(0)
    collection = animals()
    teacher = CrossEncoderTeacher(fetch(CROSS_ENCODER))
    dataset = DistillationDatasetBuilder(collection, teacher, num_negatives=3, store="scores.sqlite3").build()
    print(f"built {len(dataset)} lists", flush=True)
    losses(dataset)
    print(f"{len(LOSSES)} losses, {len(CLASSES)} classes", flush=True)
    student = adapter(dataset)
    print("adapter trained, loaded and merged", flush=True)
    before, after = evaluate(fetch(MINILM), collection), evaluate(student, collection)
    evaluate("bm25", collection)
    print(compare(before, after), flush=True)
    card = st_wkl.write_model_card(student, record=None, results={"before": before, "after": after})
    assert "nDCG@10" in card.read_text(encoding="utf-8")
    Path("config.yaml").write_text(CONFIG, encoding="utf-8")
    command("run", "config.yaml")
    assert "nDCG@10" in Path("run/student/README.md").read_text(encoding="utf-8")
    done = prepare("run/student", org="lab", revision="0123456789" * 4, license="mit", output="submission")
    mock = Path("submission/mteb_mock_run_results.md").read_text(encoding="utf-8")
    assert "MockRetrievalTask" in mock, "MTEB's layout has changed"
    assert "| ✗ |" not in mock, mock
    assert {row.name for row in done.coverage} >= {"MTEB(eng, v2)", "BEIR", "NanoBEIR"}
    print("MTEB takes the entry", flush=True)
    print("the card of a run is written: all done")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        main()
