"""SciFact's test queries in two parts: those whose documents the student was trained on, and those it never saw.

Run: python examples/scifact_shared_documents.py FOLDER     (a BEIR folder of SciFact; 15 minutes on two cores)

Teacher: ms-marco-MiniLM-L12-v2. Student: potion-base-8M, 6 epochs on BM25's top 15 and the positives, 3 seeds.
Both come from the package index, so this needs no Hub.
"""

import sys
from pathlib import Path
from statistics import mean, stdev

from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer

from st_wkl import (
    Collection,
    CrossEncoderTeacher,
    DistillationDatasetBuilder,
    ListwiseCollator,
    WeightedKLDistillationLoss,
    evaluate,
)
from st_wkl.evaluation import shared_document_queries
from st_wkl.packaged import CROSS_ENCODER, STATIC_STUDENT, fetch
from st_wkl.training import default_arguments

collection = Collection.load(sys.argv[1])
output = Path("scifact-output")
teacher = CrossEncoderTeacher(fetch(CROSS_ENCODER), max_length=256)
dataset = DistillationDatasetBuilder(collection, teacher, num_negatives=15, store=output / "scores.sqlite3").build()

trained_on = {document for judged in collection.qrels["train"].values() for document, gain in judged.items() if gain}
shared, unseen = shared_document_queries(collection.qrels["test"], trained_on)


def parts(model: SentenceTransformer) -> list[float]:
    per_query = evaluate(model, collection, split="test", name="student", show_progress=False).tasks[0].per_query
    return [mean(per_query[query] for query in queries) for queries in (list(per_query), shared, unseen)]


settings = {
    "KL": {"gamma": 0.0, "alpha": 0.0},
    "weighted KL, γ=5 α=1": {"gamma": 5.0, "alpha": 1.0},
    "weighted KL, γ=2 α=1": {"gamma": 2.0, "alpha": 1.0},
}
print(f"{'nDCG@10':34} all {len(shared) + len(unseen):10} shared {len(shared):7} unseen {len(unseen):7}", flush=True)
print(f"{'undistilled':28}", *(f"{value:16.3f}" for value in parts(SentenceTransformer(str(fetch(STATIC_STUDENT))))))
for label, parameters in settings.items():
    runs = []
    for seed in range(3):
        student = SentenceTransformer(str(fetch(STATIC_STUDENT)))
        args = default_arguments(student, output / "run")
        args.num_train_epochs, args.seed, args.logging_strategy = 6, seed, "no"
        loss = WeightedKLDistillationLoss(student, **parameters)
        collator = ListwiseCollator(student)
        SentenceTransformerTrainer(student, args, dataset.to_lists(), loss=loss, data_collator=collator).train()
        runs.append(parts(student))
    cells = (f"{mean(values):.4f} ± {stdev(values):.4f}" for values in zip(*runs, strict=True))
    print(f"{label:28}", *(f"{cell:>16}" for cell in cells), flush=True)
