"""PairDistill: beside the list, which of two neighbours in it is better.

The pairwise teacher here is the cross-encoder itself, as there is no duo reranker in the package index. With one, or
with a language model, give `CallablePairwiseTeacher` a function of your own: only then do the pairs say something new.

Run: python examples/pair_distill.py FOLDER    (a BEIR folder with train and test judgements, e.g. SciFact)

Seen on SciFact, 300 test queries, one seed: nDCG@10 0.6986, undistilled 0.5052; difference +0.1934 [+0.1594, +0.2287]
(bootstrap).
KL alone on the same lists, without pairs and without the in-batch term: 0.5928.
Two thirds of these queries share documents with training; examples/study tells the parts apart.
"""

from common import collection, lists, student, taught, teacher

from st_wkl.data import CrossEncoderPairwiseTeacher
from st_wkl.losses import PairDistillLoss

found, model, judge = collection(), student(), teacher()
data = lists(found, judge, pairwise=CrossEncoderPairwiseTeacher(judge), pairs_per_query=30)
taught(model, PairDistillLoss(model), data, found)
