"""A reranker on a server teaches: vLLM, text-embeddings-inference, or anything with /v1/rerank.

Start one where the GPU is, for instance `vllm serve Qwen/Qwen3-Reranker-0.6B --runner pooling`, and run
`python examples/remote_teacher.py FOLDER http://gpu:8000 [NAME-OF-A-KEY'S-ENVIRONMENT-VARIABLE]`
(a BEIR folder with train and test judgements, e.g. SciFact). Started again after any failure, it goes on where it was.
"""

import sys

from st_wkl import Collection, DistillationDatasetBuilder, compare, distill, evaluate
from st_wkl.data import RemoteTeacher
from st_wkl.packaged import STATIC_STUDENT, fetch

collection = Collection.load(sys.argv[1])
teacher = RemoteTeacher(sys.argv[2], api_key_env=sys.argv[3] if len(sys.argv) > 3 else None, concurrency=16)
print(teacher, teacher.identity)

builder = DistillationDatasetBuilder(collection, teacher, num_negatives=15)
print(builder.estimate())  # asks about a few hundred pairs
dataset = builder.build()

before = evaluate(fetch(STATIC_STUDENT), collection, name="before")
student = distill(fetch(STATIC_STUDENT), dataset, output_dir="my-student").student
print("difference:", compare(before, evaluate(student, collection, name="after")))
