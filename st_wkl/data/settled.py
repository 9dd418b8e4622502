"""The lists of a dataset as numbers, without what is no negative: whoever made it, this is what is trained on."""

from __future__ import annotations

import warnings
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from st_wkl.data.arrow import Ragged, places_of
from st_wkl.data.selection import is_own_text, shared_judgements, twin_queries


@dataclass
class Lists:
    """All lists, one after another, as numbers; `pairs` are (first, second, probability) and how many a row has."""

    queries: np.ndarray
    lengths: np.ndarray
    documents: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    own: np.ndarray
    pairs: tuple[np.ndarray, np.ndarray] | None

    def keep(self, kept: np.ndarray) -> None:
        """Leave documents out; the preferences then count those that stay."""
        starts = np.cumsum(self.lengths) - self.lengths
        rows = np.repeat(np.arange(len(self.lengths)), self.lengths)
        lengths = np.bincount(rows[kept], minlength=len(self.lengths))
        if self.pairs is not None:
            numbers, counts = self.pairs
            of_pair = np.repeat(np.arange(len(counts)), counts)
            places = numbers[:, :2].astype(np.int64) + starts[of_pair][:, None]
            new = (np.cumsum(kept) - 1)[places] - (np.cumsum(lengths) - lengths)[of_pair][:, None]
            both = kept[places].all(axis=1)
            numbers = np.column_stack([new, numbers[:, 2]]).astype(np.float32)[both]
            self.pairs = numbers, np.bincount(of_pair[both], minlength=len(counts))
        self.documents, self.scores, self.labels = self.documents[kept], self.scores[kept], self.labels[kept]
        self.lengths = lengths


def settled(train: pa.Table, queries: pa.Table, documents: pa.Table, *, keeps_own: bool) -> Lists:
    """Return the lists without what is no negative; of what the builder made, these are the lists as they are.

    Args:
        train: Query ids, document ids, scores, labels, and a pairwise teacher's preferences.
        queries: Ids and texts.
        documents: Ids and texts.
        keeps_own: Whether the query's own document is a document like any other.
    """
    ids = Ragged(train["document_ids"])
    lists = Lists(
        queries=places_of(train["query_id"], queries["query_id"]),
        lengths=ids.lengths,
        documents=places_of(ids.values, documents["document_id"]),
        scores=Ragged(train["scores"]).values.to_numpy().astype(np.float32, copy=False),
        labels=Ragged(train["labels"]).values.to_numpy().astype(np.int32, copy=False),
        own=np.full(len(queries), -1) if keeps_own else _own_documents(queries, documents),
        pairs=_numbers(Ragged(train["preferences"])) if "preferences" in train.column_names else None,
    )
    labels = _shared_labels(lists, queries["text"])
    changed, lost = int((labels != lists.labels).sum()), 0
    lists.labels = labels
    if (lists.own >= 0).any():
        left_out = (lists.documents == np.repeat(lists.own[lists.queries], lists.lengths)) & (labels <= 0)
        lost = int(left_out.sum())
        if lost:
            lists.keep(~left_out)
    if lost or changed:
        warnings.warn(
            f"{lost:,} lists hold the query's own document as no answer, and it is left out; {changed:,} "
            "labels are those of another query of the same words. Build the dataset again to settle it.",
            stacklevel=4,
        )
    return lists


def _own_documents(queries: pa.Table, documents: pa.Table) -> np.ndarray:
    """Return where the document of each query's id and text is, −1 where there is none."""
    own = places_of(queries["query_id"], documents["document_id"]).copy()
    for query in np.flatnonzero(own >= 0).tolist():
        if not is_own_text(queries["text"][query].as_py(), documents["text"][int(own[query])].as_py()):
            own[query] = -1
    return own


def _shared_labels(lists: Lists, texts: pa.ChunkedArray) -> np.ndarray:
    """Return the labels, those of rows of one query or of queries of the same words made the same."""
    used, counts = np.unique(lists.queries, return_counts=True)
    found = {str(query): text for query, text in zip(used.tolist(), texts.take(used).to_pylist(), strict=True)}
    alike = {int(query) for twins in twin_queries(found) for query in twins} | {*used[counts > 1].tolist()}
    if not alike:
        return lists.labels
    labels, starts = lists.labels.copy(), np.cumsum(lists.lengths) - lists.lengths
    judged: dict[str, dict[str, int]] = defaultdict(dict)
    rows = np.flatnonzero(np.isin(lists.queries, list(alike))).tolist()
    spans = [slice(starts[row], starts[row] + lists.lengths[row]) for row in rows]
    for row, span in zip(rows, spans, strict=True):
        gains = judged[str(lists.queries[row])]
        for key, gain in zip(map(str, lists.documents[span]), lists.labels[span].tolist(), strict=True):
            gains[key] = max(gain, gains.get(key, gain))
    shared, _ = shared_judgements(found, judged)
    for row, span in zip(rows, spans, strict=True):
        labels[span] = [shared[str(lists.queries[row])][str(key)] for key in lists.documents[span]]
    return labels


def _numbers(pairs: Ragged) -> tuple[np.ndarray, np.ndarray]:
    names = ("first", "second", "probability")
    found = [pc.struct_field(pairs.values, name).to_numpy().astype(np.float32) for name in names]
    return np.column_stack(found), pairs.lengths


def fit(pairs: Ragged, documents: np.ndarray) -> np.ndarray:
    """Tell which preferences name two documents of their row and hold a probability."""
    first, second, probability = (
        pc.fill_null(pc.struct_field(pairs.values, name).cast(pa.float64()), -1.0).to_numpy()
        for name in ("first", "second", "probability")
    )
    fit = (first >= 0) & (second >= 0) & (np.maximum(first, second) < documents[pairs.rows]) & (first != second)
    return fit & (probability >= 0) & (probability <= 1)
