"""RankNet: the teacher's order alone, without its scores.

Run: python examples/rank_net.py FOLDER    (a BEIR folder with train and test judgements, e.g. SciFact)

Seen on SciFact, 300 test queries, one seed: nDCG@10 0.5629, undistilled 0.5052; difference +0.0577 [+0.0319, +0.0835].
KL on the same candidates: 0.5928.
Two thirds of these queries share documents with training; examples/study tells the parts apart.
"""

from common import collection, lists, student, taught

from st_wkl.losses import RankNetDistillLoss

found, model = collection(), student()
taught(model, RankNetDistillLoss(model), lists(found), found)
