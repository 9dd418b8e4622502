"""MarginMSE: the student's margins shall be the teacher's, both scaled by their temperature.

Run: python examples/margin_mse.py FOLDER    (a BEIR folder with train and test judgements, e.g. SciFact)

Seen on SciFact, 300 test queries, one seed: nDCG@10 0.6128, undistilled 0.5052; difference +0.1076 [+0.0754, +0.1397].
KL on the same candidates: 0.5928.
Two thirds of these queries share documents with training; examples/study tells the parts apart.
"""

from common import collection, lists, student, taught

from st_wkl.losses import MarginMSEDistillLoss

found, model = collection(), student()
taught(model, MarginMSEDistillLoss(model), lists(found), found)
