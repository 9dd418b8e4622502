"""Evaluation on a dev split during training: nDCG@10 with graded gains, which upstream's evaluators do not have."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers import CrossEncoder, MultiVectorEncoder
from sentence_transformers.base.evaluation import BaseEvaluator
from torch import Tensor
from transformers.trainer_utils import IntervalStrategy

from st_wkl.data.collection_files import whole_gains
from st_wkl.data.selection import own_result, without_own
from st_wkl.metrics import score_run
from st_wkl.ranges import check_options
from st_wkl.text import text_hash

if TYPE_CHECKING:
    from sentence_transformers.base.training_args import BaseTrainingArguments

    from st_wkl.data.candidates import Candidates
    from st_wkl.data.collection import Collection
    from st_wkl.losses.scoring import Student

logger = logging.getLogger(__name__)

# The training arguments that decide which checkpoint is kept; without a dev split they decide nothing.
SELECTION_ARGUMENTS = (
    *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "save_strategy", "save_steps"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
)
# Enough for recall@100; nDCG@10 needs no more than 10.
_DEPTH = 100
# Documents that are embedded and compared at a time, so that memory does not grow with their number.
_CHUNK = 16_384


class GradedEvaluator(BaseEvaluator):
    """nDCG@10 with linear graded gains, on queries, documents and judgements, for all four model classes.

    Upstream's `InformationRetrievalEvaluator` takes graded judgements, too, but counts each as 1. This one computes
    what `st_wkl.evaluate` and MTEB do: pytrec_eval's nDCG over exact search, texts with the model's own prompts.

    Give it as `evaluator` to `distill` or to any sentence-transformers trainer; its metrics reach the log as
    `eval_<name>_ndcg_at_10` and `eval_<name>_recall_at_100`, the first of which is the one to select checkpoints by.

    Args:
        queries: `{query_id: text}`.
        documents: `{document_id: text}`.
        qrels: `{query_id: {document_id: gain}}`. Queries without a gain above 0 cannot be answered and are left out.
        candidates: `{query_id: document ids}`: rank these only. A cross-encoder needs them; for the others they make a
            large collection cheap. A relevant document that is no candidate counts as missed.
        name: Prefix of the metrics.
        batch_size: Texts, or pairs of a cross-encoder, per forward pass.
        ignore_identical_ids: Leave the document of a query's own id out of its results, see `Collection`.

    Raises:
        TypeError: If the judgements of a query are no mapping, or a text, a candidate or an id is no text.
        ValueError: If no query has a relevant document, an id has no text, or a gain is no whole number that trec_eval
            can hold.

    Example:
        >>> evaluator = GradedEvaluator(
        ...     {"q": "who purrs"}, {"a": "cats purr", "b": "dogs bark"}, {"q": {"a": 2, "b": 1}}
        ... )
        >>> evaluator.primary_metric
        'dev_ndcg_at_10'
    """

    def __init__(
        self,
        queries: Mapping[str, str],
        documents: Mapping[str, str],
        qrels: Mapping[str, Mapping[str, int]],
        *,
        candidates: Mapping[str, Sequence[str]] | None = None,
        name: str = "dev",
        batch_size: int = 32,
        ignore_identical_ids: bool = False,
    ) -> None:
        super().__init__()
        check_options(batch_size=batch_size)
        judged = {query: whole_gains(gains, f"split {name!r}, query {query!r}") for query, gains in qrels.items()}
        self.qrels = {query: gains for query, gains in judged.items() if any(gain > 0 for gain in gains.values())}
        if not self.qrels:
            raise ValueError(
                f"The split {name!r} has no query with a relevant document (gain above 0), so nothing can be measured "
                "on it. Name a split that has judgements."
            )
        if absent := [query for query in self.qrels if query not in queries]:
            raise ValueError(f"The judged query {absent[0]!r} has no text ({len(absent):,} of {len(self.qrels):,}).")
        self.queries = {query: queries[query] for query in self.qrels}
        for what, texts in (("query", self.queries), ("document", documents)):
            for key, text in texts.items():
                if not isinstance(text, str):
                    raise TypeError(f"The text of {what} {key!r} is a {type(text).__name__}, {text!r}; give a str.")
        self.documents = {key: text for key, text in documents.items() if text.strip()}
        self.candidates: dict[str, list[str]] | None = None
        if candidates is not None:
            for query in self.qrels:
                found = candidates.get(query, ())
                if isinstance(found, str) or not all(isinstance(key, str) for key in found):
                    raise TypeError(
                        f"The candidates of query {query!r} have to be document ids, got {found!r:.200}. "
                        "GradedEvaluator.of(collection, candidates=…) takes what bm25_candidates returns."
                    )
            self.candidates = {query: list(candidates.get(query, ())) for query in self.qrels}
            listed = {key for keys in self.candidates.values() for key in keys}
            if unknown := sorted(listed - documents.keys()):
                raise ValueError(f"The candidate {unknown[0]!r} is none of the documents ({len(unknown):,} are not).")
            self.documents = {key: text for key, text in self.documents.items() if key in listed}
        self.name, self.batch_size, self.ignore_identical_ids = name, batch_size, ignore_identical_ids
        self.primary_metric = f"{name}_ndcg_at_10"

    @classmethod
    def of(
        cls,
        collection: Collection,
        split: str = "dev",
        *,
        candidates: Candidates | None = None,
        max_queries: int | None = None,
        max_documents: int | None = None,
        seed: int = 0,
        batch_size: int = 32,
    ) -> GradedEvaluator:
        """Evaluate on a split of a collection, or on a part of it that is quick enough to be asked often.

        Args:
            collection: Documents, queries and judgements.
            split: Split of the judgements. Not the one that results are reported on: a checkpoint that was chosen by
                test queries looks better on them than it is.
            candidates: What `find_candidates` and its kin return; see the class.
            max_queries: A random sample of so many queries.
            max_documents: Search the judged documents of these queries and a random sample of others, so many in all.
                Scores are higher than on the whole collection, but rank checkpoints much the same.
            seed: Of both samples.
            batch_size: Texts per forward pass.

        Example:
            >>> GradedEvaluator.of(Collection.load("mteb/nfcorpus"), "dev", max_queries=100)  # doctest: +SKIP
        """
        check_options(max_queries=max_queries, max_documents=max_documents, batch_size=batch_size)
        qrels = collection.positives(split)
        draw = random.Random(seed)
        if max_queries is not None and max_queries < len(qrels):
            qrels = {query: qrels[query] for query in sorted(draw.sample(sorted(qrels), max_queries))}
        documents = collection.documents
        if max_documents is not None and candidates is None and max_documents < len(documents):
            judged = {key for gains in qrels.values() for key in gains}
            others = sorted(documents.keys() - judged)
            kept = judged | set(draw.sample(others, max(0, min(len(others), max_documents - len(judged)))))
            documents = {key: text for key, text in documents.items() if key in kept}
        lists = None
        if candidates is not None:
            own = {query: own_result(query, collection.leaves_out_own) for query in qrels}
            found = {query: [hit.document_id for hit in candidates.get(query, ())] for query in qrels}
            lists = {query: [key for key in keys if key not in own[query]][:_DEPTH] for query, keys in found.items()}
        return cls(
            collection.queries,
            documents,
            qrels,
            candidates=lists,
            name=split,
            batch_size=batch_size,
            ignore_identical_ids=collection.leaves_out_own,
        )

    def check(self, student: Student) -> None:
        """Stop before training where this cannot evaluate a student: a cross-encoder, without candidates."""
        if isinstance(student, CrossEncoder) and self.candidates is None:
            raise ValueError(
                "A cross-encoder can only rerank, and this dev split has no candidates. Give it some: "
                "GradedEvaluator.of(collection, split, candidates=bm25_candidates(collection))."
            )

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        """Return `<name>_ndcg_at_10` and, for whole-collection search, `<name>_recall_at_100`.

        Raises:
            ValueError: If a score is not a finite number, so the student has diverged.
        """
        self.check(model)
        with torch.inference_mode():
            run = self._search(model) if self.candidates is None else self._rerank(model, self.candidates)
        for query, found in run.items():
            if bad := [key for key, score in found.items() if not math.isfinite(score)]:
                raise ValueError(
                    f"The student's score of document {bad[0]!r} for query {query!r} is {found[bad[0]]}: its weights "
                    "have diverged. Start again with a smaller learning rate."
                )
        scores = score_run(self.qrels, without_own(run, self.ignore_identical_ids))[0]
        names = ["ndcg_at_10", "recall_at_100"] if self.candidates is None else ["ndcg_at_10"]
        metrics = {f"{self.name}_{label}": scores[label] for label in names}
        self.store_metrics_in_model_card_data(model, metrics, epoch, steps)  # type: ignore[arg-type]
        return metrics

    def get_config_dict(self) -> dict[str, Any]:
        """Return the sizes for the model card."""
        return {"queries": len(self.queries), "documents": len(self.documents), "reranking": bool(self.candidates)}

    def __repr__(self) -> str:
        """Show what is measured on what."""
        how = "searched" if self.candidates is None else "in candidate lists"
        return (
            f"GradedEvaluator({self.primary_metric}: {len(self.queries):,} queries, {len(self.documents):,} documents, "
            f"{how})"
        )

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides the metrics."""
        digest = hashlib.blake2b(digest_size=16)
        without_own = [True] if self.ignore_identical_ids else []
        for part in (self.queries, self.documents, self.qrels, self.candidates, *without_own):
            digest.update(json.dumps(part, sort_keys=True).encode())
        return digest.hexdigest()

    def _search(self, model: Any) -> dict[str, dict[str, float]]:
        """Search all documents exactly; keep the best 100 of each query."""
        options, depth = _options(model, self.batch_size), _DEPTH + self.ignore_identical_ids
        queries = model.encode_query(list(self.queries.values()), **options)
        keys, texts = list(self.documents), list(self.documents.values())
        scores, places = torch.empty(len(self.queries), 0), torch.empty(len(self.queries), 0, dtype=torch.long)
        for start in range(0, len(texts), _CHUNK):
            documents = model.encode_document(texts[start : start + _CHUNK], **options)
            found = _dense(model.similarity(queries, documents))
            best, where = found.topk(min(depth, found.shape[1]), dim=1)
            scores, places = torch.cat([scores, best], dim=1), torch.cat([places, where + start], dim=1)
            scores, kept = scores.topk(min(depth, scores.shape[1]), dim=1)
            places = places.gather(1, kept)
        rows = zip(self.queries, scores.tolist(), places.tolist(), strict=True)
        return {query: {keys[p]: s for p, s in zip(where, found, strict=True)} for query, found, where in rows}

    def _rerank(self, model: Any, candidates: dict[str, list[str]]) -> dict[str, dict[str, float]]:
        """Score the candidates of each query."""
        lists = {query: [key for key in candidates[query] if key in self.documents] for query in self.queries}
        if isinstance(model, CrossEncoder):
            pairs = [(self.queries[query], self.documents[key]) for query, keys in lists.items() for key in keys]
            # Raw scores: a sigmoid that saturates makes ties.
            options = {"batch_size": self.batch_size, "activation_fn": torch.nn.Identity(), "show_progress_bar": False}
            values = iter(model.predict(pairs, **options).tolist())
            return {query: {key: next(values) for key in keys} for query, keys in lists.items()}
        texts = list(self.queries.values())
        found = pool_scores(model, texts, list(lists.values()), self.documents, batch_size=self.batch_size)
        pairs_of = zip(lists.items(), found, strict=True)
        return {query: dict(zip(keys, scores.tolist(), strict=True)) for (query, keys), scores in pairs_of}


def pool_scores(
    model: Any,
    queries: Sequence[str],
    pools: Sequence[Sequence[str]],
    documents: Mapping[str, str],
    *,
    batch_size: int = 32,
) -> list[Tensor]:
    """Score each query's pool of document ids by an embedding model's own similarity, embedding every text once."""
    place = {key: number for number, key in enumerate(dict.fromkeys(key for pool in pools for key in pool))}
    if not place:
        return [torch.empty(0) for _ in pools]
    options = _options(model, batch_size)
    asked = model.encode_query(list(queries), **options)
    found = model.encode_document([documents[key] for key in place], **options)

    def rows(embeddings: Any, places: list[int]) -> Any:
        if isinstance(embeddings, list):  # the token embeddings of each text
            return [embeddings[number] for number in places]
        return embeddings.index_select(0, torch.tensor(places, device=embeddings.device))

    return [
        _dense(model.similarity(rows(asked, [number]), rows(found, [place[key] for key in pool])))[0]
        if pool
        else torch.empty(0)
        for number, pool in enumerate(pools)
    ]


def _options(model: Any, batch_size: int) -> dict[str, Any]:
    # Token embeddings of texts of any length come as a list; asking for one tensor of them is an error.
    whole = {} if isinstance(model, MultiVectorEncoder) else {"convert_to_tensor": True}
    return {"batch_size": batch_size, "show_progress_bar": False, **whole}


def _dense(scores: Any) -> Any:
    return (scores.to_dense() if scores.is_sparse else scores).float().cpu()


def set_up(args: BaseTrainingArguments, evaluator: BaseEvaluator, student: Student) -> None:
    """Let training arguments evaluate at each checkpoint and keep the best, unless they say otherwise."""
    if isinstance(evaluator, GradedEvaluator):
        evaluator.check(student)
    if args.eval_strategy == "no":
        when = getattr(args.save_strategy, "value", args.save_strategy)
        args.eval_strategy = IntervalStrategy("steps" if when == "best" else when)
        args.eval_steps, args.load_best_model_at_end = args.save_steps, when != "no"
    metric = evaluator.primary_metric
    if args.load_best_model_at_end and metric is not None and args.metric_for_best_model in (None, "loss"):
        args.metric_for_best_model, args.greater_is_better = f"eval_{metric}", evaluator.greater_is_better


def say_seen(evaluator: BaseEvaluator, *datasets: Any) -> None:
    """Say how many dev queries are trained on: they choose the checkpoint that knows them by heart."""
    if not isinstance(evaluator, GradedEvaluator):
        return
    known = [dataset for dataset in datasets if hasattr(dataset, "queries")]
    trained = {text_hash(text) for dataset in known for text in dataset.queries["text"]}
    if seen := sum(text_hash(text) in trained for text in evaluator.queries.values()):
        logger.warning(
            "%d of %d dev queries are training queries: the checkpoint that is kept may be the one that knows them by "
            "heart. Take another split.",
            seen,
            len(evaluator.queries),
        )


def score(evaluator: BaseEvaluator, student: Student) -> float:
    """Return the main metric of a student."""
    found = evaluator(student)
    return round(float(found if isinstance(found, int | float) else found[str(evaluator.primary_metric)]), 6)
