"""Lists in the layouts of other projects, which the importers read back."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from st_wkl.data.arrow import Ragged

_AT_ONCE = 1_000  # lists as Python's objects


def write_flagembedding(folder: Path, train: pa.Table, queries: pa.Table, documents: pa.Table) -> None:
    """Write `train.jsonl`: a line for each list with `query, pos, neg, pos_scores, neg_scores`, and the ids beside.

    Gains other than 1 stand in `pos_gains` and `neg_gains`.
    """
    texts = dict(zip(documents["document_id"].to_pylist(), documents["text"].to_pylist(), strict=True))
    asked = dict(zip(queries["query_id"].to_pylist(), queries["text"].to_pylist(), strict=True))
    plain = set(np.unique(Ragged(train["labels"]).values.to_numpy()).tolist()) <= {0, 1}
    bare = 0
    with (folder / "train.jsonl").open("w", encoding="utf-8") as file:
        for start in range(0, len(train), _AT_ONCE):
            for row in train.slice(start, _AT_ONCE).to_pylist():
                line = {"query_id": row["query_id"], "query": asked[row["query_id"]]}
                found = [*zip(row["document_ids"], row["scores"], row["labels"], strict=True)]
                for side, is_of in (("pos", lambda gain: gain > 0), ("neg", lambda gain: gain <= 0)):
                    part = [entry for entry in found if is_of(entry[2])]
                    line[side] = [texts[key] for key, _, _ in part]
                    line[f"{side}_id"] = [key for key, _, _ in part]
                    line[f"{side}_scores"] = [score for _, score, _ in part]
                    if not plain:
                        line[f"{side}_gains"] = [gain for _, _, gain in part]
                bare += not line["pos"]
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    if bare:
        warnings.warn(f"{bare:,} of {len(train):,} lists have no positive, at which FlagEmbedding stops.", stacklevel=3)


def write_pylate(folder: Path, train: pa.Table, queries: pa.Table, documents: pa.Table) -> None:
    """Write `train.parquet`, `queries.parquet` and `documents.parquet` as PyLate takes them, which knows no gains.

    These stand in `judgements.parquet`, as in the table of lists PyLate would take them for texts.
    """
    pq.write_table(train.select(["query_id", "document_ids", "scores"]), folder / "train.parquet")
    pq.write_table(queries, folder / "queries.parquet")
    pq.write_table(documents, folder / "documents.parquet")
    ids, labels = Ragged(train["document_ids"]), Ragged(train["labels"])
    judged = np.flatnonzero(labels.values.to_numpy() != 0)
    columns = {"query_id": train["query_id"].take(pa.array(ids.rows[judged]))}
    columns |= {"document_id": ids.values.take(pa.array(judged)), "gain": labels.values.take(pa.array(judged))}
    pq.write_table(pa.table(columns), folder / "judgements.parquet")


LAYOUTS = {"flagembedding": write_flagembedding, "pylate": write_pylate}
