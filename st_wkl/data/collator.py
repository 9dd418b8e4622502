"""Lists of any length as batches for the stock trainers, which upstream's collators refuse."""

from __future__ import annotations

import importlib
import math
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.base.data_collator import BaseDataCollator

from st_wkl.data.selection import Choice, choose, no_negatives
from st_wkl.functional._scores import LARGEST_SCORE, MASK_VALUES
from st_wkl.losses.lists import ABSENT, CHANNELS, pack, with_vectors
from st_wkl.model_checks import check_fits
from st_wkl.models import own_prompt
from st_wkl.ranges import check_options

if TYPE_CHECKING:
    from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder
    from sentence_transformers.base.training_args import BaseTrainingArguments

    from st_wkl.data.vectors import TeacherVectors

QUERY, DOCUMENTS, SCORES, LABELS, PAIRS, RANKS = "query", "documents", "scores", "labels", "pairs", "ranks"
OWN = "own"
TEXT, SIDE = "text", "side"
_KINDS = ("sentence_transformer", "sparse_encoder", "multi_vector_encoder", "cross_encoder")


@dataclass
class ListwiseCollator(BaseDataCollator):
    """Turns rows of a query and its scored candidates into a batch, whatever the length of each list.

    A row holds `query`, `documents` (a list of texts), `scores` (the teacher's, in the same order; only needed by
    losses that listen to a teacher) and `labels` (judged gains). `DistillationDataset.to_lists()` makes such rows. A
    document that stands in several lists of a batch is embedded once. For `PairDistillLoss`, a row also holds `pairs`:
    a pairwise teacher's preferences as `[i, j, probability]`, saying that document i of the list is better than j. For
    `WeightedKLDistillationLoss(ranks="dataset")` it holds `ranks` of its documents, 1 = best. `own` may be the text of
    a document that is the query itself: like any document of the query's very text, and what answers another row of
    the same query, it is no negative of the row in the batch. For `EmbeddingDistillLoss` alone, a row may be a single
    `text`, whose `side` is "query" or "document".

    Pass it as `data_collator=ListwiseCollator(model)` to the trainer of any of the four model classes. For an
    `IterableDataset`, also set `accelerator_config={"dispatch_batches": False}` in the training arguments: otherwise
    accelerate cuts every tensor of a batch to its number of rows, and there are more documents than rows.

    Args:
        model: The model that is going to be trained; its tokenizer is used. For a `CrossEncoder`, texts stay texts, as
            its losses pair them first.
        prompts: Prompt of each side, `{"query": "…", "document": "…"}`, or one for both, or either by dataset name.
            A side that is not named gets the model's own prompt, the one that it is used and evaluated with; `""` is
            none.
        max_length: Longest text in tokens, one for both or `{"query": …, "document": …}`. Default: the model's own.
        args: Training arguments, whose `prompts` and `max_length` count where these are not given. Default: those of
            the trainer that trains the model, which are known from its first training batch on; give them to a trainer
            that evaluates before it trains. A prompt or length that is not the model's own is said once.
        negatives_per_step: Negatives of a row that a step sees at most, beside all its positives; drawn anew in each
            epoch, so that long lists cost no more than short ones. Needs `DrawAnewCallback(collator)` among the
            trainer's callbacks, which tells the epoch; `distill` puts it there. Default: all.
        draw: How: `"random"`, `"quantiles"` of the teacher's scores, or `"top"`, those that the teacher (where
            there is none, the list) has first, the same in each epoch. See `Selection`.
        seed: Of the draws, which depend on it, the epoch and the row's query alone.
        vectors: A teacher's embeddings of all texts, for `EmbeddingDistillLoss`: `VectorStore.embed` makes them.

    Raises:
        ValueError: When a batch is made, if a row lacks a column, holds a null or empty query, a null document, or
            lists of different length, if a score is not finite, or if the trainer's loss is one of
            sentence-transformers' own, which would take documents for positives by their place.

    Example:
        >>> from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
        >>> student = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")  # doctest: +SKIP
        >>> collator = ListwiseCollator(student)  # doctest: +SKIP
        >>> SentenceTransformerTrainer(student, train_dataset=data, loss=loss, data_collator=collator)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: SentenceTransformer | SparseEncoder | MultiVectorEncoder | CrossEncoder,
        *,
        prompts: str | dict[str, str] | dict[str, dict[str, str]] | None = None,
        max_length: int | dict[str, int] | None = None,
        args: BaseTrainingArguments | None = None,
        negatives_per_step: int | None = None,
        draw: Choice = "random",
        seed: int = 0,
        vectors: TeacherVectors | None = None,
    ) -> None:
        check_options(negatives_per_step=negatives_per_step, seed=seed)
        if draw not in get_args(Choice):
            raise ValueError(f"draw must be one of {', '.join(map(repr, get_args(Choice)))}, got {draw!r}.")
        prompts = getattr(args, "prompts", None) if prompts is None else prompts
        max_length = getattr(args, "max_length", None) if max_length is None else max_length
        super().__init__(preprocess_fn=model.preprocess, prompts=prompts, max_length=max_length)
        self.model = model
        self.negatives_per_step, self.draw, self.seed = negatives_per_step, draw, seed
        self.epoch: int | None = None
        self.vectors = vectors
        self.texts_only = isinstance(model, CrossEncoder)
        self._asks = [name for name in ("prompts", "max_length") if args is None and getattr(self, name) is None]
        self._former = model.model_card_data.all_hyperparameters  # of a training before this one
        self._said: set[tuple[str, Any]] = set()
        self._checked: Any = None
        self._check_length()

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate rows into one batch with the columns `query` and `document` and a label tensor."""
        batch: dict[str, Any] = {}
        self._take_arguments()
        if "dataset_name" in features[0]:
            batch["dataset_name"] = features[0]["dataset_name"]
        if TEXT in features[0]:
            return self._texts(batch, features)
        for row in features:
            _check(row)
        if self.negatives_per_step is not None:
            features = [self._drawn(row, self.negatives_per_step) for row in features]
        queries = [row[QUERY] for row in features]
        scores = [row[SCORES] for row in features] if SCORES in features[0] else None
        gains = [row[LABELS] for row in features]
        pairs = None
        if any(PAIRS in row for row in features):
            pairs = [[(int(i), int(j), p) for i, j, p in row.get(PAIRS) or ()] for row in features]
        if self.texts_only:
            # Each pair is read anew, so nothing is shared between lists: number the places list by list.
            texts = [text for row in features for text in row[DOCUMENTS]]
            numbers = iter(range(len(texts)))
            indices = [[next(numbers) for _ in row[DOCUMENTS]] for row in features]
            prompt = self._prompt(batch, "pair")
            batch |= {} if not prompt else {"prompt": prompt}
            batch |= {QUERY: queries, DOCUMENTS: [list(row[DOCUMENTS]) for row in features]}
        else:
            unique: dict[str, int] = {}
            indices = [[unique.setdefault(text, len(unique)) for text in row[DOCUMENTS]] for row in features]
            texts = list(unique)
            self._tokenize(batch, "query", queries)
            self._tokenize(batch, "document", texts)
        ranks = [row[RANKS] for row in features] if RANKS in features[0] else None
        others = None
        if not self.texts_only:
            others = no_negatives([(row[QUERY], row[DOCUMENTS], row[LABELS], row.get(OWN)) for row in features], unique)
        batch["label"] = pack(indices, texts, scores, gains, pairs, ranks, others)
        if self.vectors is not None:
            batch["label"] = with_vectors(batch["label"], self._embedded({"query": queries, "document": texts}))
        return batch

    def _texts(self, batch: dict[str, Any], features: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate single texts, those of each side as one column."""
        if self.vectors is None:
            raise ValueError(
                "Rows of single texts have nothing but a teacher's embeddings to teach: give ListwiseCollator(model, "
                "vectors=VectorStore().embed(teacher, …)), as distill(embedding_teacher=…) does."
            )
        found = {side: [row[TEXT] for row in features if row[SIDE] == side] for side in ("query", "document")}
        if sum(map(len, found.values())) < len(features):
            wrong = next(row[SIDE] for row in features if row[SIDE] not in found)
            raise ValueError(f"a text has the side {wrong!r}; it has to be 'query' or 'document'.")
        for side, texts in found.items():
            if texts:
                self._tokenize(batch, side, texts)
        labels = torch.full((len(features), 1, CHANNELS), ABSENT)
        batch["label"] = with_vectors(labels, self._embedded(found), texts=True)
        return batch

    def _embedded(self, texts: dict[Any, list[str]]) -> torch.Tensor:
        assert self.vectors is not None, "asked where there are vectors"
        return torch.from_numpy(
            np.concatenate([self.vectors.of(found, side) for side, found in texts.items() if found])
        )

    def _drawn(self, row: dict[str, Any], most: int) -> dict[str, Any]:
        """Return a row with its positives and some of its negatives, in the order that they had."""
        if self.epoch is None:
            raise ValueError(
                "ListwiseCollator(negatives_per_step=…) has not been told the epoch, without which each would see the "
                "same negatives: give the trainer callbacks=[DrawAnewCallback(collator)], from st_wkl.training."
            )
        negatives = [place for place, gain in enumerate(row[LABELS]) if not gain > 0]
        if len(negatives) <= most:
            return row
        scores = None
        if row.get(SCORES) is not None:
            scores = [row[SCORES][place] for place in negatives]
            if self.draw == "top":
                negatives.sort(key=lambda place: -row[SCORES][place])
        key = f"{self.epoch} {row[QUERY]}"
        chosen = choose(len(negatives), most, self.draw, scores=scores, seed=self.seed, key=key)
        left_out = {*negatives} - {negatives[place] for place in chosen}
        kept = [place for place in range(len(row[DOCUMENTS])) if place not in left_out]
        new = {place: number for number, place in enumerate(kept)}
        lists = {name: row[name] for name in (DOCUMENTS, SCORES, LABELS, RANKS) if row.get(name) is not None}
        drawn = {**row, **{name: [values[place] for place in kept] for name, values in lists.items()}}
        if row.get(PAIRS):
            drawn[PAIRS] = [[new[int(i)], new[int(j)], p] for i, j, p in row[PAIRS] if {int(i), int(j)} <= new.keys()]
        return drawn

    def _take_arguments(self) -> None:
        """Ask the model's card what its trainer was told; a trainer tells its arguments to its own collator only."""
        told = self.model.model_card_data.all_hyperparameters  # made anew when training begins
        if told is self._former:
            return
        if self._checked is not told:
            _check_losses(self.model.model_card_data.train_datasets)
            self._checked = told
        before = self.max_length
        for name in self._asks:
            setattr(self, name, told.get(name))
        if self.max_length != before:
            self._check_length()

    def _check_length(self) -> None:
        given = self.max_length
        check_fits(self.model, max(given.values(), default=None) if isinstance(given, dict) else given)
        if given and given != (own := self.model.max_seq_length):
            self._say("max_length", str(given), f"texts are cut to {given} tokens in training, and to {own} in use.")

    def _say(self, what: str, value: Any, message: str) -> None:
        if (what, value) not in self._said:
            self._said.add((what, value))
            warnings.warn(f"ListwiseCollator: {message}", stacklevel=3)

    def _tokenize(self, batch: dict[str, Any], side: str, texts: list[str]) -> None:
        # The task is what routes a Router and what a late-interaction model formats by; other models ignore it.
        prompt = self._prompt(batch, side)
        max_length = self._get_max_length_for_task(side)
        limits = {} if max_length is None else {"max_length": max_length}
        for key, value in self.preprocess_fn(texts, prompt=prompt, task=side, **limits).items():
            batch[f"{side}_{key}"] = value
        batch[f"{side}_task"] = side

    def _prompt(self, batch: dict[str, Any], side: str) -> str | None:
        """Return the prompt that is given for a side, or the model's own."""
        found, own = self._given_prompt(batch, side), own_prompt(self.model, side)
        if found is None:
            return own
        if found != (own or ""):
            self._say(
                side,
                found,
                f"the prompt {found!r} stands before each {side} in training, and {own or ''!r} in use. Give the model "
                "its prompts, as in SentenceTransformer(…, prompts=…), so that both are the same.",
            )
        return found

    def _given_prompt(self, batch: dict[str, Any], side: str) -> str | None:
        given = self._resolve_prompts(batch)
        if isinstance(given, str):
            return given
        sides = ("pair",) if self.texts_only else ("query", "document")
        named = given or {}
        if (unknown := sorted(named.keys() - set(sides))) and "dataset_name" not in batch:
            raise ValueError(
                f"ListwiseCollator knows the prompts of {' and '.join(sides)}, and was given one for {unknown[0]!r}, "
                "which would be used nowhere."
            )
        return named.get(side)


def _check_losses(datasets: Iterable[dict[str, Any]]) -> None:
    """Stop where a loss of sentence-transformers is trained on lists: by place, wrong documents are its positives.

    Args:
        datasets: What the trainer tells the model's card of its datasets and losses when it is made.
    """
    modules = [importlib.import_module(f"sentence_transformers.{kind}.losses") for kind in _KINDS]
    upstream = {name for module in modules for name in dir(module)}
    for told in datasets:
        loss = told.get("loss", {})
        # A wrapper's own name and those of what it wraps: a loss of another package may know lists.
        names = re.findall(r"\w+Loss\b", f"{loss.get('fullname', '')} {loss.get('config_code', '')}")
        if names and f"<code>{DOCUMENTS}</code>" in told.get("columns", ()) and {*names} <= upstream:
            raise ValueError(
                f"{names[-1]} of sentence-transformers takes columns, and would take the documents of these lists for "
                "the positives of its queries, one after the other. Train it on DistillationDataset.to_columns() "
                "without ListwiseCollator, or take st_wkl's own: InBatchContrastiveLoss contrasts lists."
            )


def _check(row: dict[str, Any]) -> None:
    missing = [name for name in (QUERY, DOCUMENTS, LABELS) if name not in row]
    if missing:
        raise ValueError(
            f"ListwiseCollator needs the columns query, documents, scores and labels; a row lacks {missing} and has "
            f"{sorted(row)}. DistillationDataset.to_lists() makes such rows."
        )
    query = row[QUERY]
    if not isinstance(query, str) or not query.strip():
        raise ValueError(f"a row has the query {query!r} with documents {str(row[DOCUMENTS])[:80]}… Drop that row.")
    lengths = {name: len(row[name]) for name in (DOCUMENTS, SCORES, LABELS, RANKS) if row.get(name) is not None}
    if len(set(lengths.values())) > 1 or not lengths.get(DOCUMENTS):
        raise ValueError(
            f"the row of the query {query!r} has lists of length {lengths}. Every document needs one score and one "
            "label, and there has to be at least one; mend or drop the row."
        )
    for place, document in enumerate(row[DOCUMENTS]):
        if not isinstance(document, str):
            raise ValueError(f"document {place} of the query {query!r} is {document!r}, not a text. Drop it.")
    for place, score in enumerate(row.get(SCORES) or []):
        if score is None or not math.isfinite(score) or abs(score) > LARGEST_SCORE or score in MASK_VALUES:
            raise ValueError(
                f"the score of document {place} of the query {query!r} is {score}. One such score makes every weight "
                "of the student NaN: score the pair again, or drop the document from the list. (What masked places are "
                "filled with is no score.)"
            )
    for place, rank in enumerate(row.get(RANKS) or []):
        if rank is None or not rank >= 1:
            raise ValueError(
                f"the rank of document {place} of the query {query!r} is {rank}; ranks count from 1, the best."
            )
    for i, j, probability in row.get(PAIRS) or []:
        documents = len(row[DOCUMENTS])
        told = probability is not None and 0 <= probability <= 1
        if not (0 <= i < documents and 0 <= j < documents and i != j and told):
            raise ValueError(
                f"the preference [{i}, {j}, {probability}] of the query {query!r} does not fit its {documents} "
                "documents, of which it must name two, counting from 0, or is no probability. Drop it, or ask the "
                "pairwise teacher again."
            )
