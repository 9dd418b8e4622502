"""Teacher scores, computed once and kept as ids and numbers, so that the runs need no teacher."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import bm25s
import pandas as pd
import Stemmer
from runs import HERE

from st_wkl import Collection, CrossEncoderTeacher, DistillationDatasetBuilder
from st_wkl.data.selection import Selection
from st_wkl.packaged import CROSS_ENCODER, fetch


def score(name: str, config: dict[str, Any], data: str, output: Path) -> None:
    """Score BM25's best documents and the positives of a collection's training queries, or say that it is done."""
    file = HERE / "scores" / f"{name}.parquet"
    if file.is_file():
        print(f"{file} is there already.")
        return
    options = config["collections"][name]
    collection = Collection.load(Path(data) / name)
    query_ids = list(collection.qrels["train"])
    query_ids = random.Random(0).sample(query_ids, len(query_ids))[: options["queries"]]
    dataset = DistillationDatasetBuilder(
        collection,
        CrossEncoderTeacher(fetch(CROSS_ENCODER), max_length=config["teacher"]["max_length"]),
        query_ids=query_ids,
        num_negatives=options["negatives"],
        selection=Selection(max_positives=options["max_positives"]),
        store=output / "scores.sqlite3",
    ).build()
    table = dataset.train.to_pandas()
    table["bm25"] = _bm25(collection, table)
    file.parent.mkdir(exist_ok=True)
    table.astype({"query_id": str}).to_parquet(file, compression="zstd")
    print(f"{file}: {len(table)} queries, {file.stat().st_size / 1e6:.2f} MB\n{dataset.provenance['report']}")


def _bm25(collection: Collection, table: pd.DataFrame) -> list[list[float]]:
    """Return BM25 scores of the same pairs, the weaker teacher."""
    stemmer = Stemmer.Stemmer("english")
    index = bm25s.BM25(method="lucene")
    index.index(
        bm25s.tokenize(list(collection.documents.values()), stemmer=stemmer, show_progress=False), show_progress=False
    )
    places = {key: place for place, key in enumerate(collection.documents)}
    found = []
    for row in table.itertuples():
        words = bm25s.tokenize(
            collection.queries[row.query_id], stemmer=stemmer, return_ids=False, show_progress=False
        )[0]
        scores = index.get_scores([word for word in words if word in index.vocab_dict]) if words else None
        found.append([float(scores[places[key]]) if scores is not None else 0.0 for key in row.document_ids])
    return found
