"""Candidates and ranks that follow the student while it trains."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.util import get_rank, get_world_size
from transformers import TrainerCallback

from st_wkl.data.runs import Candidates
from st_wkl.files import write_text
from st_wkl.ranges import check_options
from st_wkl.training.checkpoints import checkpoint_folder
from st_wkl.training.dev import pool_scores

if TYPE_CHECKING:
    from st_wkl.data.builder import DistillationDatasetBuilder
    from st_wkl.data.dataset import DistillationDataset

logger = logging.getLogger(__name__)

Retriever = SentenceTransformer | SparseEncoder | MultiVectorEncoder

_STATE_FILE = "refreshed_candidates.json"
_COLUMNS = ("query_id", "document_ids", "scores", "labels", "preferences")


class RefreshCandidatesCallback(TrainerCallback):
    """Every k steps the student proposes new candidates, the teacher scores what is new, and training goes on with it.

    A student soon outgrows the negatives that it was given: it ranks them low already, and what it now ranks high by
    mistake is not among them. Ranks age in the same way: those that CKL weighs by are, in the authors' code, renewed
    every 1,000 to 2,000 steps.

    Give `train_dataset` to the trainer together with `ListwiseCollator`, and the callback to its `callbacks`. The rows
    of that dataset change under the trainer: their number and order stay, a query whose list cannot be renewed keeps
    its old one. Rows have to be read in the training process (`dataloader_num_workers=0`). Checkpoints hold the lists;
    a run that is resumed goes on as if it had not been stopped.

    Args:
        builder: The builder that made the dataset. Its teacher, store, selection and pairwise teacher serve for the new
            lists, too. Its candidates, if it has any, are what `ranks` counts in.
        dataset: What the builder built, at the start of training.
        every: Steps between refreshes. A refresh embeds the collection and scores about one new pair for each document
            that was not in the query's list, so on small collections once an epoch is a good start.
        candidates: Mine and score new lists. False leaves the lists as they are.
        ranks: Add the column `ranks`, for `WeightedKLDistillationLoss(ranks="dataset")`: the place of each document,
            by the student at the last refresh, among the candidates that were mined for its query.
        batch_size: Texts that are embedded at once.
        show_progress: Show bars of mining and scoring.

    Raises:
        ValueError: If there is nothing to refresh, `every` is below 1, rows are read by workers, or a checkpoint holds
            the lists of another dataset.
        TypeError: When training starts, if the student cannot search a collection.

    Source:
        Yang, Qiao, He, Yang, SIGIR 2024, https://arxiv.org/abs/2406.05977, for the ranks; candidates proposed by the
        student and judged by the teacher as in speculative distillation, https://arxiv.org/abs/2410.11325.

    Example:
        >>> builder = DistillationDatasetBuilder("mteb/nfcorpus", "BAAI/bge-reranker-v2-m3")  # doctest: +SKIP
        >>> refresh = RefreshCandidatesCallback(builder, builder.build(), every=100)  # doctest: +SKIP
        >>> distill(student, refresh.train_dataset, output_dir="my-student", callbacks=[refresh])  # doctest: +SKIP
    """

    def __init__(
        self,
        builder: DistillationDatasetBuilder,
        dataset: DistillationDataset,
        *,
        every: int = 1000,
        candidates: bool = True,
        ranks: bool = False,
        batch_size: int = 32,
        show_progress: bool = False,
    ) -> None:
        check_options(every=every, batch_size=batch_size)
        if not candidates and not ranks:
            raise ValueError("There is nothing to refresh: ask for candidates, ranks, or both.")
        self.builder, self.every, self.batch_size = copy.copy(builder), every, batch_size
        if not builder.drop_leaks:
            self.builder.against = None  # the leaks of the queries were reported once and stay what they are
        self.refreshes_candidates, self.refreshes_ranks = candidates, ranks
        self.show_progress = show_progress
        self.history: list[dict[str, int]] = []
        self._mined = builder.candidates or Candidates()
        self._rows: list[dict[str, Any]] = [
            {name: row[name] for name in _COLUMNS if name in row} for row in dataset.train.with_format(None).to_list()
        ]
        # The lists before the last refresh: what a trainer had fetched by then it trains on after it.
        self._previous = self._rows
        self._one_batch_behind = False
        self._refreshed_at = 0

    @property
    def train_dataset(self) -> Dataset:
        """Rows of `query`, `documents`, `scores`, `labels`, with `pairs` and `ranks` where there are any, as they are.

        They are looked up at the moment that a batch is made.
        """

        def current(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
            lists = self._previous if self._one_batch_behind else self._rows
            self._one_batch_behind = False
            rows = [self._row(lists[place]) for place in batch["documents"]]
            return {name: [row[name] for row in rows] for name in rows[0]}

        # A plain function, since `datasets` copies its transforms deeply with all that belongs to a bound method. The
        # places of the rows carry the name of what they become: `distill` tells lists from columns by it.
        return Dataset.from_dict({"documents": list(range(len(self._rows)))}).with_transform(current)

    def run_identity(self) -> dict[str, Any]:
        """Return what decides which lists training meets, in JSON values."""
        builder = self.builder
        return {
            "every": self.every,
            "candidates": self.refreshes_candidates,
            "ranks": self.refreshes_ranks,
            "collection": builder.collection.fingerprint,
            "teacher": builder.teacher.identity,
            "pairwise": None if builder.pairwise is None else builder.pairwise.identity,
            "num_negatives": builder.num_negatives,
            "selection": builder.selection.to_dict(),
        }

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        texts = self.builder.collection
        found = {
            "query": texts.queries[row["query_id"]],
            "documents": [texts.documents[document_id] for document_id in row["document_ids"]],
            "scores": row["scores"],
            "labels": row["labels"],
        }
        if row.get("preferences") is not None:
            found["pairs"] = [[pair["first"], pair["second"], pair["probability"]] for pair in row["preferences"]]
        if texts.leaves_out_own:
            found["own"] = texts.documents.get(row["query_id"], "")
        if self.refreshes_ranks:
            found["ranks"] = row.get("ranks") or [1] * len(row["document_ids"])
        return found

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the setting, and take the lists of a checkpoint where training is resumed."""
        model = kwargs["model"]
        if isinstance(model, CrossEncoder):
            raise TypeError("A CrossEncoder cannot search a collection, so it proposes no candidates.")
        if args.dataloader_num_workers > 0:
            raise ValueError(
                f"dataloader_num_workers={args.dataloader_num_workers}: worker processes hold copies of the lists, "
                "which no refresh reaches. Set it to 0."
            )
        if state.global_step:
            self.load(checkpoint_folder(args, state, resumed=True))
            # An undisturbed run had fetched one batch ahead of the refresh, except at the end of an epoch.
            within_epoch = not float(state.epoch or 0).is_integer()
            self._one_batch_behind = within_epoch and self._refreshed_at == state.global_step
        elif self.refreshes_ranks:
            self._rank(model)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refresh every k steps, but not after the last one."""
        if state.global_step % self.every == 0 and state.global_step < state.max_steps:
            self.refresh(kwargs["model"], state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the lists beside the weights."""
        if state.is_world_process_zero:
            self.save(checkpoint_folder(args, state), state.global_step)

    def refresh(self, model: Retriever, step: int = 0) -> None:
        """Let the student propose candidates, have the new ones scored, and rank; `history` tells of the step."""
        training, before = model.training, self._rows
        if self.refreshes_candidates:
            self._mine(model)
        if self.refreshes_ranks:
            self._rank(model)
        model.train(training)
        self._previous, self._refreshed_at = before, step
        pairs = [({*old["document_ids"]}, {*new["document_ids"]}) for old, new in zip(before, self._rows, strict=True)]
        said = {
            "step": step,
            "changed_lists": sum(old != new for old, new in pairs),
            "new_documents": sum(len(new - old) for old, new in pairs),
        }
        self.history.append(said)
        logger.info("refreshed: %s", said)

    def _mine(self, model: Any) -> None:
        found: list[Any] = [None]
        if get_rank() == 0:
            builder = self.builder
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what is left out was said when the dataset was built
                self._mined = builder.candidates = builder.find_candidates(model, show_progress=self.show_progress)
                found = [builder.build(show_progress=self.show_progress).train.with_format(None).to_list()]
        if get_world_size() > 1:
            torch.distributed.broadcast_object_list(found, src=0)
        new = {row["query_id"]: row for row in found[0]}
        self._rows = [new.get(row["query_id"], row) for row in self._rows]

    def _rank(self, model: Any) -> None:
        texts, pools = self.builder.collection, []
        for row in self._rows:
            mined = dict.fromkeys(hit.document_id for hit in self._mined.get(row["query_id"], ()))
            ranked = [key for key in mined if key not in texts.own_document(row["query_id"])]
            pools.append(list(dict.fromkeys([*row["document_ids"], *ranked])))
        queries, training = [texts.queries[row["query_id"]] for row in self._rows], model.training
        ranks = student_ranks_in(model, queries, pools, texts.documents, batch_size=self.batch_size)
        model.train(training)
        kept = zip(self._rows, ranks, strict=True)
        self._rows = [{**row, "ranks": rank[: len(row["document_ids"])]} for row, rank in kept]

    def save(self, folder: Path, step: int) -> Path:
        """Write the lists to a folder; those before the refresh as well, where it was at this very step."""
        previous = self._previous if step == self._refreshed_at else None
        state = {"step": self._refreshed_at, "rows": self._rows, "previous": previous, "history": self.history}
        return write_text(folder / _STATE_FILE, json.dumps(state, ensure_ascii=False, allow_nan=False))

    def load(self, folder: Path) -> None:
        """Take the lists that `save` wrote.

        Raises:
            FileNotFoundError: If the folder holds none.
            ValueError: If they belong to another dataset.
        """
        path = folder / _STATE_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist, so the lists of that run are not known. Resume from a checkpoint that was "
                "saved with this callback, in the output_dir of the training arguments."
            )
        state = json.loads(path.read_text(encoding="utf-8"))
        queries = [row["query_id"] for row in state["rows"]]
        if queries != [row["query_id"] for row in self._rows]:
            raise ValueError(f"{path} holds the lists of other queries: it belongs to another dataset.")
        self._rows, self.history = state["rows"], state["history"]
        self._previous, self._refreshed_at = state["previous"] or state["rows"], state["step"]


def student_ranks_in(
    model: Retriever,
    queries: Sequence[str],
    pools: Sequence[Sequence[str]],
    documents: Mapping[str, str],
    *,
    batch_size: int = 32,
) -> list[list[int]]:
    """Rank each query's pool of document ids by a student's own similarity, 1 = best, in the order of the pools."""
    found = pool_scores(model, queries, pools, documents, batch_size=batch_size)
    negated = [-scores.numpy() for scores in found]
    return [(np.searchsorted(np.sort(scores), scores, side="left") + 1).tolist() for scores in negated]
