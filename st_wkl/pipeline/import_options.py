"""What `st-wkl import` may be told; what it makes is a folder, which is all that the other stages are told of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ImportConfig:
    """What others, or the user, have in tables with columns of any name; made into a folder, which stages take.

    Args:
        source: File (JSON lines, CSV, TSV, Parquet, a run of TREC), folder of files, or Hub id.
        query: Column of the query's text, where its name is not recognised.
        query_id: Column of its id.
        text: Column of the document's text.
        title: Column of its title.
        id: Column of its id.
        score: Column of a teacher's scores: a distillation dataset is made.
        label: Column of gains, such as grades or clicks; 0 is not relevant.
        queries: Table of queries of a corpus, where they are not beside the documents.
        judgements: Table of its judgements.
        test_share: Share of its queries that become the split `test`.
        by: How these are drawn: by `query`, or by `document`, so that none shares a relevant one with training.
        seed: Of the draw.
        collection: Collection whose texts and judgements belong to scores by id.
        split: Split of its judgements.
        scores: Scores of lists that have none.
        teacher: Name of the model that made the scores, for the card.
        missing: `raise` an error for a pair without a text or a finite score, a judgement of what is not there, or
            `drop` it, counted.
        revision: Branch, tag or commit of a Hub id. Default: the newest.
    """

    source: str
    query: str | None = None
    query_id: str | None = None
    text: str | None = None
    title: str | None = None
    id: str | None = None
    score: str | None = None
    label: str | None = None
    queries: str | None = None
    judgements: str | None = None
    test_share: float = 0.0
    by: Literal["query", "document"] = "query"
    seed: int = 0
    collection: str | None = None
    split: str = "train"
    scores: str | None = None
    teacher: str | None = None
    missing: Literal["raise", "drop"] = "raise"
    revision: str | None = None
