"""Candidates that follow the student: every 10 steps it proposes new ones, which the teacher scores.

Run: python examples/refresh.py FOLDER    (a BEIR folder with train and test judgements, e.g. SciFact)

Seen on SciFact, 300 test queries, one seed: nDCG@10 0.5719, undistilled 0.5052; difference +0.0667 [+0.0415, +0.0919].
300 training queries with 7 negatives; the first refresh changed all lists, the second 187 (1,609 and 271 new pairs).
Two thirds of these queries share documents with training; examples/study tells the parts apart.
"""

import sys

from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer

from st_wkl import Collection, CrossEncoderTeacher, DistillationDatasetBuilder, ListwiseCollator, compare, evaluate
from st_wkl.losses import WeightedKLDistillationLoss
from st_wkl.packaged import CROSS_ENCODER, STATIC_STUDENT, fetch
from st_wkl.training import default_arguments
from st_wkl.training.refresh import RefreshCandidatesCallback

collection = Collection.load(sys.argv[1])
teacher = CrossEncoderTeacher(fetch(CROSS_ENCODER), max_length=256)
queries = list(collection.qrels["train"])[:300]
builder = DistillationDatasetBuilder(collection, teacher, num_negatives=7, query_ids=queries)
refresh = RefreshCandidatesCallback(builder, builder.build(), every=10, ranks=True)
student = SentenceTransformer(str(fetch(STATIC_STUDENT)))
before = evaluate(student, collection, name="before")
args = default_arguments(student, "refresh-output")
loss = WeightedKLDistillationLoss(student, gamma=2.0, ranks="dataset")
options = {"data_collator": ListwiseCollator(student), "callbacks": [refresh]}
SentenceTransformerTrainer(student, args, refresh.train_dataset, loss=loss, **options).train()
after = evaluate(student, collection, name="after")
print(refresh.history)
print(after.table())
print("difference:", compare(before, after))
