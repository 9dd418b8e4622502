"""Pearson: scores that correlate with the teacher's, without any temperature to choose.

Run: python examples/pearson.py FOLDER    (a BEIR folder with train and test judgements, e.g. SciFact)

Seen on SciFact, 300 test queries, one seed: nDCG@10 0.5901, undistilled 0.5052; difference +0.0848 [+0.0569, +0.1128].
KL on the same candidates: 0.5928.
Two thirds of these queries share documents with training; examples/study tells the parts apart.
"""

from common import collection, lists, student, taught

from st_wkl.losses import PearsonDistillLoss

found, model = collection(), student()
taught(model, PearsonDistillLoss(model), lists(found), found)
