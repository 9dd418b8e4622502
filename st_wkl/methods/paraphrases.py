"""Paraphrases of queries as a column of training data."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset


def add_paraphrases(columns: Dataset, paraphrases: Mapping[str, str]) -> Dataset:
    """Put a paraphrase beside each query, as `CoherenceLoss` reads it.

    Args:
        columns: `query`, `positive`, and any negatives, such as `DistillationDataset.to_columns()`; a `label` column is
            replaced.
        paraphrases: `{query: paraphrase}`. Queries without one, or whose paraphrase is blank or the query itself, get
            the label 0; they are counted and warned about.

    Returns:
        The columns `query`, `paraphrase`, then the documents, and `label`: 1.0 where there is a paraphrase, else 0.0.

    Raises:
        ValueError: There is no column `query`, or none of the queries has a paraphrase.

    Example:
        >>> from datasets import Dataset
        >>> data = Dataset.from_dict({"query": ["cat food"], "positive": ["What cats eat."]})
        >>> add_paraphrases(data, {"cat food": "what to feed a cat"}).column_names
        ['query', 'paraphrase', 'positive', 'label']
    """
    if "query" not in columns.column_names:
        raise ValueError(f"The columns are {columns.column_names}; one of them must be 'query'.")
    found = [(paraphrases.get(query) or "").strip() for query in columns["query"]]
    found = ["" if text == query.strip() else text for text, query in zip(found, columns["query"], strict=True)]
    missing = sum(not text for text in found)
    if missing == len(found):
        raise ValueError(f"None of {len(found):,} queries has a paraphrase. They are looked up by the query's text.")
    if missing:
        warnings.warn(f"{missing:,} of {len(found):,} queries have no paraphrase.", stacklevel=2)
    texts = [text or query for text, query in zip(found, columns["query"], strict=True)]
    documents = [name for name in columns.column_names if name not in ("query", "label", "paraphrase")]
    result = columns.select_columns(["query", *documents])
    result = result.add_column("paraphrase", texts).add_column("label", [float(bool(text)) for text in found])
    return result.select_columns(["query", "paraphrase", *documents, "label"])
