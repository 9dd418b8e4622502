"""Candidates that follow the student: every 10 steps it proposes new ones, which the teacher scores.

Run: python examples/refresh.py FOLDER    (a BEIR folder with train and test judgements, e.g. SciFact)

Seen on SciFact, 300 test queries, one seed: nDCG@10 0.5719, undistilled 0.5052; difference +0.0667 [+0.0415, +0.0919].
300 training queries with 7 negatives; the first refresh changed all lists, the second 187 (1,609 and 271 new pairs).
Two thirds of these queries share documents with training; examples/study tells the parts apart.
"""

from common import collection, student, taught, teacher

from st_wkl import DistillationDatasetBuilder, WeightedKLDistillationLoss
from st_wkl.training.refresh import RefreshCandidatesCallback

found, model = collection(), student()
queries = list(found.qrels["train"])[:300]
builder = DistillationDatasetBuilder(found, teacher(), num_negatives=7, query_ids=queries)
refresh = RefreshCandidatesCallback(builder, builder.build(), every=10, ranks=True)
loss = WeightedKLDistillationLoss(model, gamma=2.0, ranks="dataset")
taught(model, loss, refresh.train_dataset, found, refresh)
print(refresh.history)
