"""Train a tiny student under torchrun, or in one process, and save its weights; run by test_distributed.py."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.util import get_rank

from st_wkl.data.collator import ListwiseCollator
from st_wkl.losses import InBatchContrastiveLoss, WeightedKLDistillationLoss, WeightedSumLoss
from tests.helpers.processes import COMPARABLE, leave
from tests.helpers.students import make_student, ragged_rows


def main(model_path: str, output: str, processes: str, mini_batch_size: str) -> None:
    torch.set_num_threads(1)
    model = make_student("dense", Path(model_path)).double()
    rows = ragged_rows(24)
    for row in rows:
        row["labels"][0] = 1  # a mean over queries with a positive is only the mean of means if every query has one
    terms = [
        (1.0, WeightedKLDistillationLoss(model)),
        (0.5, InBatchContrastiveLoss(model, gather_across_devices=True)),
    ]
    args = SentenceTransformerTrainingArguments(
        output_dir=f"{output}.run",
        per_device_train_batch_size=8 // int(processes),
        max_steps=3,
        learning_rate=0.05,
        save_strategy="no",
        **COMPARABLE,
    )
    loss = WeightedSumLoss(model, terms, mini_batch_size=int(mini_batch_size) or None)
    SentenceTransformerTrainer(
        model, args, Dataset.from_list(rows), loss=loss, data_collator=ListwiseCollator(model)
    ).train()
    if get_rank() == 0:
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, output)
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
