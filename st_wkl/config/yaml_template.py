"""The commented file that `st-wkl init` writes."""

from __future__ import annotations

import yaml

from st_wkl.config.tree import FORMAT

TEMPLATE = """\
# A whole run of st-wkl: `st-wkl run {name}`. Run it again after a crash, and it goes on where it was.
# `--set training.learning_rate=1e-3` overrides a key for one run. Every key has a default except those marked (*).
format: {format}
output: {output}              # (*) everything that the run makes goes here

collection:
  source: {collection}        # (*) BEIR folder, or Hub id or folder in MTEB's layout, such as mteb/nfcorpus
  split: train                # its judgements say what is relevant
  limit: null                 # use the first so many queries only
  missing: raise              # or drop: leave out judgements of documents or queries that are not there
  ignore_identical_ids: null  # leave out the document of a query's own id; null: if most queries are documents

candidates:
  sources: [bm25]             # bm25:k1=0.9,b=0.4, run files of TREC, retrievers (Hub id, folder, packaged:...), fused
  top_k: 100
  num_negatives: 15           # of a training list, beside all judged positives

teacher:
  model: {teacher}            # (*) cross-encoder: Hub id, folder (torch or ONNX), or packaged:ms-marco-MiniLM-L12-v2
  max_length: null            # tokens of a pair; null for the model's own. 256 halves the time on long documents
  store: null                 # SQLite file of scores; null for the user's cache, shared by all runs
  engine: process             # process, pool (several processes) or ray
  trust_remote_code: false    # true: run code of the model's repository, which you have read; student: likewise

selection:                    # which candidates become negatives
  choice: top                 # top, random or quantiles
  relative_margin: null       # such as 0.95: drop negatives that score higher than this share of the positive
  label_correction: null      # raise_positives or swap_positives, where the teacher contradicts the judgements
  near_duplicates: 0.9        # drop candidates that are nearly the words of a positive

student:
  model: {student}            # (*) Hub id, folder, or packaged:potion-base-8M, packaged:all-MiniLM-L6-v2
  prompts: {{}}                 # such as {{query: "query: ", document: "passage: "}}; its own where it has any

loss:
  name: null                  # null: KL and an in-batch contrastive term; `st-wkl train --help` lists all
  in_batch: null              # weight of a contrastive term over the batch beside the named loss; null for none
  mini_batch_size: null       # texts embedded at once: bounds memory; null for 32 with transformers
  parameters: {{}}              # such as {{student_temperature: 0.02}}; of weighted-kl {{gamma: 2}}

training: {{}}                  # arguments of sentence-transformers' trainer, such as
                              #   {{learning_rate: 2e-5, num_train_epochs: 3, per_device_train_batch_size: 32}}
lora: false                   # true, or parameters of peft.LoraConfig such as {{r: 32}}
dev: null                     # {{split: dev, patience: 3}}: keep the checkpoint that is best on this split

evaluation:                   # null for none
  tasks: []                   # MTEB names or collections; empty for the collection itself
  split: test
"""


def template(
    name: str = "config.yaml",
    *,
    collection: str = "mteb/nfcorpus",
    teacher: str = "cross-encoder/ms-marco-MiniLM-L12-v2",
    student: str = "minishlab/potion-base-8M",
    output: str = "run",
) -> str:
    """Return a commented configuration to start from.

    Example:
        >>> from st_wkl.config import RunConfig
        >>> RunConfig.from_dict(yaml.safe_load(template())).student.model
        'minishlab/potion-base-8M'
    """
    quoted = {
        key: yaml.safe_dump(value).removesuffix("\n...\n").strip()
        for key, value in {
            "collection": collection, "teacher": teacher, "student": student, "output": output
        }.items()
    }  # fmt: skip
    return TEMPLATE.format(name=name, format=FORMAT, **quoted)
