"""What a user does with the Hub, in one process because imports are slow: run by test_hub.py, prints what happened.

Arguments: the tiny BERT's folder, and a folder to work in. The environment is that of `FakeHub.environment`.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import types
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.utils._http
import torch
from datasets import load_dataset
from huggingface_hub import hf_hub_download
from peft import LoraConfig, TaskType
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder

from st_wkl.cli import app
from st_wkl.data.dataset import DistillationDataset
from st_wkl.models import hash_weights
from st_wkl.publish.hub import push_dataset, push_student
from st_wkl.publish.model_card import write_model_card
from st_wkl.record import EXPOSURE_FILE, Exposure
from st_wkl.text import text_hash
from st_wkl.training.lora import merge
from tests.helpers.cards import PROVENANCE, dataset, record, results
from tests.helpers.command import CliRunner
from tests.helpers.fake_hub import EXPIRED, READING, WRITING

TEXTS = ["a query of the house", "what is that", "he was not there", "by the book"]
tiny, work = Path(sys.argv[1]), Path(sys.argv[2])
report: dict[str, Any] = {}
logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)  # a token would show here if it showed anywhere
# The library waits up to 8 s before it tries again, five times.
huggingface_hub.utils._http.time = types.SimpleNamespace(sleep=lambda seconds: None)  # type: ignore[assignment]


def attempt(action: Callable[[], Any]) -> str:
    """Return the error of `action` as text, `""` if there was none."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def faults(**kinds: Any) -> None:
    """Break the network of the Hub, or mend it."""
    url = f"{os.environ['HF_ENDPOINT']}/_faults"
    urllib.request.urlopen(urllib.request.Request(url, json.dumps(kinds).encode(), method="POST")).read()


def same(one: Any, other: Any) -> bool:
    return bool(torch.equal(torch.as_tensor(one), torch.as_tensor(other)))


def card_of(repo: str, repo_type: str = "model") -> str:
    return Path(hf_hub_download(repo, "README.md", repo_type=repo_type)).read_text()


def local_card(folder: str, stand_in: str, repo: str) -> str:
    return (work / folder / "README.md").read_text().replace(stand_in, repo)


# Whole models.
dense = SentenceTransformer(str(tiny))
dense.save_pretrained(str(work / "dense"))
write_model_card(work / "dense", record=record(student=str(tiny)), results={"after": results(str(tiny), 0.5)})
record(student=str(tiny)).save(work / "dense")
exposure = Exposure(frozenset({text_hash("secret training text")}), frozenset())
exposure.save(work / "dense")
(work / "dense/checkpoint-10").mkdir()
for name in ("checkpoint-10/model.safetensors", "optimizer.pt", "training_args.bin", "triplets.jsonl", "notes.txt"):
    (work / "dense" / name).write_text("secret training text")
pushed = push_student(work / "dense", "me/dense")
report["dense"] = {
    "url": pushed.url,
    "left_out": pushed.left_out,
    "same": same(dense.encode(TEXTS), SentenceTransformer("me/dense").encode(TEXTS)),
    "card": card_of("me/dense") == local_card("dense", "sentence_transformers_model_id", "me/dense"),
    "exposure": Exposure.load(Path(hf_hub_download("me/dense", EXPOSURE_FILE)).parent) == exposure,
    "again": push_student(work / "dense", "me/dense").url,
}

reranker = CrossEncoder(str(tiny), num_labels=1)
reranker.save_pretrained(str(work / "reranker"))
readme = (work / "reranker/README.md").read_text()
samples = "* Samples:\n  | text |\n  |:--|\n  | secret training text |\n"
readme = readme.replace("tags:", "widget:\n- text: secret training text\ntags:", 1)
(work / "reranker/README.md").write_text(readme.replace("## Training Details", f"## Training Details\n\n{samples}"))
push_student(work / "reranker", "me/reranker")
pairs = [(TEXTS[0], text) for text in TEXTS]
report["reranker"] = {
    "same": same(reranker.predict(pairs), CrossEncoder("me/reranker").predict(pairs)),
    "card": card_of("me/reranker"),
}
sparse, multi_vector = SparseEncoder(str(tiny)), MultiVectorEncoder(str(tiny))
sparse.save_pretrained(str(work / "sparse"))
multi_vector.save_pretrained(str(work / "multi-vector"))
for kind in ("sparse", "multi-vector"):
    push_student(work / kind, f"me/{kind}")
one, other = (model.encode(TEXTS).to_dense() for model in (sparse, SparseEncoder("me/sparse")))
report["sparse"] = {"same": same(one, other)}
one, other = (model.encode_document(TEXTS) for model in (multi_vector, MultiVectorEncoder("me/multi-vector")))
report["multi-vector"] = {"same": all(map(same, one, other))}

# An adapter, and then the merged model in its place.
adapted = SentenceTransformer(str(work / "dense"))
adapted.add_adapter(LoraConfig(TaskType.FEATURE_EXTRACTION, r=2, target_modules=["query"], init_lora_weights=False))
adapted.save_pretrained(str(work / "adapter"))
expected = adapted.encode(TEXTS)
report["adapter"] = {
    "without_base": attempt(lambda: push_student(work / "adapter", "me/adapted")),
    "files": push_student(work / "adapter", "me/adapted", base_model="me/dense").files,
    "same": same(expected, SentenceTransformer("me/adapted").encode(TEXTS)),
    "differs": not same(expected, dense.encode(TEXTS)),
    "card": card_of("me/adapted"),
}
merged = push_student(merge(work / "adapter", work / "merged"), "me/adapted")
at_home, came_back = (SentenceTransformer(str(name)).encode(TEXTS) for name in (work / "merged", "me/adapted"))
report["merged"] = {
    "removed": merged.removed,
    "same": same(at_home, came_back),
    "as_adapter": float(abs(came_back - expected).max()) < 1e-5,
}

# A dataset.
data = dataset(PROVENANCE)
data.save_to_disk(work / "dataset")
report["dataset"] = {
    "url": data.push_to_hub("me/dataset"),
    "rows": DistillationDataset.from_hub("me/dataset").to_lists().to_list() == data.to_lists().to_list(),
    "provenance": DistillationDataset.from_hub("me/dataset").provenance
    == {**PROVENANCE, "command": "st-wkl build mteb/scifact --store scores.sqlite3"},
    "configs": {
        name: load_dataset("me/dataset", name, split="train").to_list() == getattr(data, name).to_list()
        for name in ("train", "queries", "documents")
    },
    "card": card_of("me/dataset", "dataset") == local_card("dataset", "path/to/this/folder", "me/dataset"),
}

# Other people's repositories.
report["foreign"] = attempt(lambda: push_student(work / "dense", "me/foreign"))
report["edited"] = attempt(lambda: push_dataset(data, "me/edited"))
report["pull_request"] = push_student(work / "dense", "me/foreign", create_pr=True).url
report["elsewhere"] = push_student(work / "dense", "other/model", private=False, create_pr=True).url
report["everybody"] = attempt(lambda: push_student(work / "dense", "other/model", create_pr=True))
report["nobody"] = attempt(lambda: push_student(work / "dense", "me/nothing", create_pr=True))

# The command line.
run = CliRunner().invoke(app, ["push", str(work / "dense"), "me/shown", "--public", "--json"])
report["cli"] = json.loads(run.stdout)
run = CliRunner().invoke(app, ["push", str(work / "dataset"), "me/dataset", "--dataset", "--pr", "--quiet"])
report["cli_pull_request"] = run.output
report["cli_dataset"] = CliRunner().invoke(app, ["push", str(work / "dataset"), "me/shown"]).output

# Tokens. Whatever the Hub says, the files here stay as they are.
at_home_before = {path: path.read_bytes() for path in (work / "dense").rglob("*") if path.is_file()}
for name, token in (("expired", EXPIRED), ("reading", READING), ("none", None)):
    os.environ.pop("HF_TOKEN")
    os.environ.update({"HF_TOKEN": token} if token else {})
    report[name] = attempt(lambda: push_student(work / "dense", "me/forbidden"))
    os.environ["HF_TOKEN"] = WRITING
report["strangers"] = attempt(lambda: push_student(work / "dense", "other/new"))
report["files_stay"] = at_home_before == {
    path: path.read_bytes() for path in (work / "dense").rglob("*") if path.is_file()
}

# What is broken here is seen before anything is sent.
shutil.copytree(work / "dense", work / "broken")
readme = (work / "broken/README.md").read_text()
(work / "broken/README.md").write_text(readme.replace("tags:", "tags: [", 1))
report["broken_card"] = attempt(lambda: push_student(work / "broken", "me/broken"))
(work / "broken/README.md").write_text(readme.replace("tags:", "license: 3.5\ntags:", 1))
report["refused_card"] = attempt(lambda: push_student(work / "broken", "me/broken"))
weights = (work / "broken/model.safetensors").read_bytes()
(work / "broken/model.safetensors").write_bytes(weights[: len(weights) // 2])
report["cut_weights"] = attempt(lambda: push_student(work / "broken", "me/broken"))

(work / "reranker" / EXPOSURE_FILE).write_text('{"format": 1, "queries": ["secret training text"], "positives": []}')
# Trained on after its card was written: the results are no longer its own.
shutil.copytree(work / "dense", work / "stale")
mine = results(str(tiny), 0.5)
mine.model["weights"] = hash_weights(dense)
write_model_card(work / "stale", record=None, results={"after": mine})
report["not_stale"] = attempt(lambda: push_student(work / "stale", "me/measured"))
shutil.copy(work / "merged/model.safetensors", work / "stale/model.safetensors")
report["stale"] = attempt(lambda: push_student(work / "stale", "me/broken"))
mine.save(work / "stale")
(work / "stale/results.json").write_bytes((work / "stale/results.json").read_bytes()[:-40])
(work / "stale/README.md").unlink()
report["cut_results"] = attempt(lambda: push_student(work / "stale", "me/broken"))
report["no_hashes"] = attempt(lambda: push_student(work / "reranker", "me/broken"))

# The network breaks.
torch.manual_seed(1)
with torch.no_grad():
    for parameter in dense.parameters():
        parameter.add_(torch.randn_like(parameter))
dense.save_pretrained(str(work / "other"))
faults(cut_inside="PUT /_lfs")
report["cut_upload"] = attempt(lambda: push_student(work / "other", "me/cut"))
faults(cut_at="POST .*/commit/")
report["cut_before_commit"] = attempt(lambda: push_student(work / "other", "me/cut"))
faults(cut_after=".*")
report["cut_after_commit"] = attempt(lambda: push_student(work / "other", "me/cut"))
faults()
report["after_cuts"] = {
    "error": attempt(lambda: push_student(work / "other", "me/cut")),
    "same": same(dense.encode(TEXTS), SentenceTransformer("me/cut").encode(TEXTS)),
}
faults(cut_inside="PUT /_lfs", times=1)
adapted.save_pretrained(str(work / "adapter2"))
report["short_break"] = attempt(lambda: push_student(work / "adapter2", "me/again", base_model="me/cut"))
sys.stdout.write(json.dumps(report) + "\n")
