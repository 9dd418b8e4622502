"""Train with candidates that follow the student, under torchrun or in one process; run by test_refresh.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)

from st_wkl import DistillationDatasetBuilder, ListwiseCollator, WeightedKLDistillationLoss
from st_wkl.training.refresh import RefreshCandidatesCallback
from tests.helpers.animals import WordOverlap, small_collection
from tests.helpers.processes import COMPARABLE, leave


def main(model_path: str, output: str, processes: str) -> None:
    torch.set_num_threads(1)
    # Doubles, in which two ways of adding up the same numbers hardly differ, so that the same documents are found.
    student = SentenceTransformer(model_path).double()
    store = Path(output) / "scores.sqlite3"
    builder = DistillationDatasetBuilder(small_collection(), WordOverlap(), num_negatives=4, store=store)
    refresh = RefreshCandidatesCallback(builder, builder.build(show_progress=False), every=2, ranks=True)
    args = SentenceTransformerTrainingArguments(
        output_dir=output,
        per_device_train_batch_size=8 // int(processes),
        max_steps=6,
        learning_rate=20.0,
        save_strategy="no",
        **COMPARABLE,
    )
    SentenceTransformerTrainer(
        student,
        args,
        refresh.train_dataset,
        loss=WeightedKLDistillationLoss(student, ranks="dataset"),
        data_collator=ListwiseCollator(student),
        callbacks=[refresh],
    ).train()
    seen = {"history": refresh.history, "rows": refresh.train_dataset[:], "asked": len(builder.teacher.asked)}
    (Path(output) / f"seen-{args.process_index}.json").write_text(json.dumps(seen), encoding="utf-8")
    if args.process_index == 0:
        save_file(dict(student.state_dict()), Path(output) / "weights.safetensors")
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
