"""What the Hub reads of a model card: the front matter, and the `.eval_results` files."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml

from st_wkl.evaluation.results import Results, TaskScores
from st_wkl.files import file_name, write_text
from st_wkl.markdown import is_hub_id
from st_wkl.metrics import METRIC_LABELS
from st_wkl.publish._texts import model_class
from st_wkl.publish.licences import Licence

if TYPE_CHECKING:
    from st_wkl.record import TrainingRecord

# Marks our entries in the model-index, so that writing the card again replaces them and leaves others alone.
SOURCE, _SOURCE_URL = "st-wkl", "https://pypi.org/project/st-wkl/"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_OURS = "# Written by st_wkl.\n"
_PIPELINES = {
    "SentenceTransformer": "sentence-similarity",
    "SparseEncoder": "feature-extraction",
    "MultiVectorEncoder": "feature-extraction",
    "CrossEncoder": "text-ranking",
}


def fill_front_matter(
    card: ModelCard, folder: Path, record: TrainingRecord | None, after: Results | None, licence: Licence | None
) -> None:
    """Add tags, base model, datasets, licence and model-index; what is there stays."""
    data = cast(ModelCardData, card.data)
    tags = [data.tags] if isinstance(data.tags, str) else list(data.tags or [])
    tags += ["st-wkl", "knowledge-distillation"] if record else ["st-wkl"]
    if not is_hub_id(data.base_model):
        data.base_model = None
    if data.pipeline_tag is None and (folder / "config_sentence_transformers.json").is_file():
        data.pipeline_tag = _PIPELINES[model_class(folder)]
    if record is not None:
        tags.append(f"loss:{record.loss}")
        if data.base_model is None and is_hub_id(record.student):
            data.base_model = record.student
        collection = name_of(record.dataset)
        if is_hub_id(collection):
            known = [data.datasets] if isinstance(data.datasets, str) else list(data.datasets or [])
            data.datasets = list(dict.fromkeys([*known, collection]))
    if data.base_model is not None and (record is not None or _adapter(folder)):
        cast(Any, data).base_model_relation = "adapter" if _adapter(folder) else "finetune"
    data.tags = list(dict.fromkeys(tags))
    if licence is not None and licence.id is not None and not data.license:
        data.license = licence.id
        if licence.name:
            data.license_name = licence.name
    foreign = [entry for entry in data.eval_results or [] if entry.source_name != SOURCE]
    entries = foreign + (_model_index(after) if after else [])
    data.eval_results = entries or None
    if entries:
        data.model_name = data.model_name or folder.resolve().name


def write_eval_results(folder: Path, after: Results) -> list[Path]:
    """Write `.eval_results/<task>.yaml` for each task whose dataset is on the Hub, and remove those written before.

    The Hub shows them on the model's page and on the dataset's leaderboard, on MTEB's scale of 0 to 100.
    """
    target = folder / ".eval_results"
    for old in target.glob("*.yaml"):
        if old.read_text(encoding="utf-8").startswith(_OURS):
            old.unlink()
    tasks: dict[str, list[EvalResultEntry]] = {}
    for scores in after.tasks:
        if dataset := _dataset_of(scores):
            tasks.setdefault(scores.task, []).extend(_entries(scores, dataset, after))
    written = []
    for task, entries in tasks.items():
        path = target / f"{file_name(re.sub(r'[^A-Za-z0-9_.-]', '_', task))}.yaml"
        if path.exists():
            continue  # somebody else's: MTEB writes files of this name as well
        text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)
        written.append(write_text(path, _OURS + text))
    return written


def _entries(scores: TaskScores, dataset: str, results: Results) -> Iterator[EvalResultEntry]:
    common: dict[str, Any] = {
        "dataset_id": dataset,
        "value": round(100 * float(scores.main_score), 5),
        "dataset_revision": scores.dataset_revision,
        "date": results.created,
        "source_url": _SOURCE_URL,
        "source_name": SOURCE,
        "notes": f"{METRIC_LABELS.get(scores.main_metric, scores.main_metric)} times 100, through MTEB",
    }
    yield EvalResultEntry(task_id=scores.task, **common)
    yield EvalResultEntry(task_id=f"{scores.task}_{scores.subset}_{scores.split}", **common)


def _dataset_of(scores: TaskScores) -> str | None:
    """Return the dataset on the Hub that was evaluated on, if it was one."""
    return _hub_dataset(scores.task) if _COMMIT.fullmatch(scores.dataset_revision) else None


@functools.cache
def _hub_dataset(task: str) -> str | None:
    """Return the dataset of a task that MTEB knows by name; a task of ours or a variant of one has none."""
    import mteb

    try:
        path = mteb.get_task(task).metadata.dataset["path"]
    except (KeyError, ValueError):
        return None
    return path if is_hub_id(path) else None


def _model_index(results: Results) -> list[EvalResult]:
    """Return the model-index entries of the usual metrics as plain floats, on MTEB's scale of 0 to 100."""
    entries = []
    for scores in results.tasks:
        metrics = [metric for metric in METRIC_LABELS if metric in scores.metrics]
        if scores.main_metric not in metrics:
            metrics.append(scores.main_metric)
        entries += [
            EvalResult(
                task_type="information-retrieval",
                task_name="Information Retrieval",
                dataset_type=_dataset_of(scores) or scores.task,
                dataset_name=scores.task,
                dataset_config=None if scores.subset == "default" else scores.subset,
                dataset_split=scores.split,
                dataset_revision=scores.dataset_revision if _COMMIT.fullmatch(scores.dataset_revision) else None,
                metric_type=metric,
                metric_name=f"{METRIC_LABELS.get(metric, metric)} (0 to 100)",
                metric_value=round(100 * float(scores.metrics[metric]), 5),
                source_name=SOURCE,
                source_url=_SOURCE_URL,
            )
            for metric in metrics
        ]
    return entries


def _adapter(folder: Path) -> dict[str, Any]:
    """Return the configuration of a peft adapter, empty where the model is whole."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def adapter_settings(folder: Path) -> dict[str, Any]:
    """Return what an adapter's own files say of LoRA, for records that do not say it."""
    config = _adapter(folder)
    names = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "targets"}
    return {name: config[key] for key, name in names.items() if key in config}


def name_of(description: Mapping[str, Any]) -> str:
    """Return what a teacher's identity or a dataset's provenance calls itself."""
    for key in ("name", "model", "collection"):
        value = description.get(key)
        if isinstance(value, Mapping):
            return name_of(value)
        if value:
            return str(value)
    return "unknown"
