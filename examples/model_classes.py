"""One loss, one dataset, four classes of students: dense, sparse, late interaction and cross-encoder.

Run: python examples/model_classes.py FOLDER [CLASS …]    (a BEIR folder of Cranfield; 10 minutes on two cores for all)

Two thirds of the judged queries train, the others test, on the same documents: adaptation, not generalisation. All
students start from all-MiniLM-L6-v2. The dense one is a finished retriever; the heads of the others are new, and 150
training queries are far too few for them: what this shows is that each class learns, not how good it can become.
"""

import sys
from pathlib import Path

from sentence_transformers import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    MultiVectorEncoder,
    MultiVectorEncoderTrainer,
    MultiVectorEncoderTrainingArguments,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    SparseEncoder,
    SparseEncoderTrainer,
    SparseEncoderTrainingArguments,
)
from sentence_transformers.sparse_encoder.losses import SpladeLoss
from torch import nn

from st_wkl import (
    Collection,
    CrossEncoderTeacher,
    DistillationDatasetBuilder,
    ListwiseCollator,
    WeightedKLDistillationLoss,
    compare,
    evaluate,
)
from st_wkl.data.candidates import bm25_candidates
from st_wkl.data.selection import Selection
from st_wkl.evaluation import Results, evaluate_run
from st_wkl.packaged import CROSS_ENCODER, MINILM, fetch

CLASSES = {
    "dense": (SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments, 2e-5),
    "sparse": (SparseEncoder, SparseEncoderTrainer, SparseEncoderTrainingArguments, 2e-5),
    "multi-vector": (MultiVectorEncoder, MultiVectorEncoderTrainer, MultiVectorEncoderTrainingArguments, 1e-4),
    "cross-encoder": (CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments, 5e-5),
}
loaded = Collection.load(sys.argv[1])
judged = list(loaded.qrels["test"].items())
qrels = {"train": dict(q for n, q in enumerate(judged) if n % 3), "test": dict(judged[::3])}
collection = Collection("cranfield-by-query", loaded.documents, loaded.queries, qrels)
output = Path("model-classes-output")
builder = DistillationDatasetBuilder(
    collection,
    CrossEncoderTeacher(fetch(CROSS_ENCODER), max_length=256),
    num_negatives=5,
    selection=Selection(max_positives=1),
    store=output / "scores.sqlite3",
)
dataset = builder.build().to_lists()
candidates = bm25_candidates(collection, list(collection.qrels["test"]), top_k=10)


def measured(model: nn.Module) -> Results:
    if not isinstance(model, CrossEncoder):
        return evaluate(model, collection, split="test", name="student", show_progress=False)
    pairs = [(query, found.document_id) for query, list_ in candidates.items() for found in list_]
    texts = [(collection.queries[query], collection.documents[document]) for query, document in pairs]
    run: dict[str, dict[str, float]] = {query: {} for query in candidates}
    for (query, document), score in zip(pairs, model.predict(texts, activation_fn=nn.Identity()), strict=True):
        run[query][document] = float(score)
    return evaluate_run(run, collection, name="student, reranking BM25 top 10")


for kind in sys.argv[2:] or CLASSES:
    student_class, trainer_class, arguments_class, learning_rate = CLASSES[kind]
    student = student_class(str(fetch(MINILM)), **({"num_labels": 1} if kind == "cross-encoder" else {}))
    student.max_seq_length = 64 if kind != "cross-encoder" else 96
    before = measured(student)
    loss: nn.Module = WeightedKLDistillationLoss(student, gamma=2.0, mini_batch_size=16 if kind != "sparse" else None)
    if kind == "sparse":
        loss = SpladeLoss(student, loss, document_regularizer_weight=1e-6, query_regularizer_weight=1e-6)
    args = arguments_class(
        output_dir=str(output / kind),
        per_device_train_batch_size=16 if kind != "sparse" else 4,
        num_train_epochs=2,
        learning_rate=learning_rate,
        warmup_steps=0.1,
        seed=0,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        dataloader_pin_memory=False,
    )
    trainer_class(student, args, dataset, loss=loss, data_collator=ListwiseCollator(student)).train()
    after = measured(student)
    print(f"{kind:14} {before.ndcg_at_10:.3f} → {after.ndcg_at_10:.3f}: {compare(before, after)}", flush=True)
