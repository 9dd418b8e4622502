"""Coherence: a query and its paraphrase shall find the same documents.

The paraphrases here are the queries without their short words, as people type them into a search box; a language model
writes better ones.

Run: python examples/coherence.py FOLDER    (a BEIR folder with train and test judgements, e.g. SciFact)

Seen on SciFact, 300 test queries, one seed: nDCG@10 0.7256, undistilled 0.5052; difference +0.2204 [+0.1817, +0.2591].
Two thirds of these queries share documents with training; examples/study tells the parts apart.
"""

from common import collection, student, taught, teacher

from st_wkl import DistillationDatasetBuilder
from st_wkl.losses import CoherenceLoss
from st_wkl.methods.paraphrases import add_paraphrases

found, model = collection(), student()
columns = DistillationDatasetBuilder(found, teacher()).build().to_columns(n=4)
keywords = {query: " ".join(word for word in query.split() if len(word) > 3) for query in columns["query"]}
taught(model, CoherenceLoss(model), add_paraphrases(columns, keywords), found)
