"""What the Hub reads of a card: the front matter, changed as text so that what is not ours stays to the letter.

Reading YAML and writing it again would make 1.1 of the version 1.10, `false` of `no`, and lose comments, quotes, order
and anchors.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCard,
    RepoCard,
    eval_result_entries_to_yaml,
)
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import eval_results_to_model_index

from st_wkl.evaluation.results import Results, TaskScores
from st_wkl.files import file_name, write_text
from st_wkl.markdown import is_hub_id, markdown_text
from st_wkl.metrics import METRIC_LABELS
from st_wkl.models import saved_class
from st_wkl.publish.licences import Licence
from st_wkl.publish.saved import CLASSES
from st_wkl.reading import check_keys
from st_wkl.record import TrainingRecord

_INDEX = "model-index"
# Marks our entries in the model-index, so that writing the card again replaces them and leaves others alone.
SOURCE = "st-wkl"
_SOURCE: dict[str, Any] = {"source_name": SOURCE, "source_url": "https://pypi.org/project/st-wkl/"}
_COMMIT = re.compile(r"[0-9a-f]{40}")
_OURS = "# Written by st_wkl.\n"


def read_card(path: Path, title: str) -> tuple[str, ModelCard]:
    """Return the card in `path`, as it is written and as it is read, or say in which line it is broken."""
    content = f"---\nlibrary_name: sentence-transformers\n---\n\n# {markdown_text(title)}\n"
    if path.exists():
        content = path.read_bytes().decode("utf-8-sig")  # bytes, as text mode would change the line endings
    match = REGEX_YAML_BLOCK.search(content)
    line, what = 1, "that begins here has no closing ---"
    try:
        if match:
            check_keys(yaml.compose(match.group(2), Loader=yaml.SafeLoader), line=2)
        if match or not content.lstrip().startswith("---"):
            return content, ModelCard(content)
    except yaml.MarkedYAMLError as error:
        line = (error.problem_mark.line if error.problem_mark else 0) + 2  # counted from 0, after the opening ---
        what = f"is not valid YAML ({error.problem})"
    except ValueError as error:
        if "model_index" in str(error):
            line = next((n for n, text in enumerate(content.splitlines(), 1) if text.startswith(_INDEX)), 1)
        what = f"cannot be read ({error})"
    raise ValueError(f"{path}:{line}: the front matter {what}; correct it, or delete the file and save the model again")


def fill_front_matter(
    card: ModelCard,
    folder: Path,
    record: TrainingRecord | None,
    collections: Iterable[str],
    after: Results | None,
    licence: Licence | None,
) -> None:
    """Add tags, base model, datasets, licence and model-index; what is there stays."""
    data = cast(Any, card.data)
    adapter = (folder / "adapter_config.json").is_file()

    def more(known: Any, *new: str) -> list[str]:
        return list(dict.fromkeys([*([known] if isinstance(known, str) else known or []), *new]))

    data.tags = more(data.tags, "st-wkl")
    if not is_hub_id(data.base_model):
        data.base_model = None
    if data.pipeline_tag is None and (folder / "config_sentence_transformers.json").is_file():
        data.pipeline_tag = CLASSES[saved_class(folder)][1]
    if record is not None:
        losses = [f"loss:{name}" for name in record.loss.split(", ")]
        data.tags = more(data.tags, "knowledge-distillation", *losses)
        if data.base_model is None and is_hub_id(record.student):
            data.base_model = record.student
        if known := [name for name in collections if is_hub_id(name)]:
            data.datasets = more(data.datasets, *known)
    if data.base_model is not None and (record is not None or adapter):
        data.base_model_relation = "adapter" if adapter else "finetune"
    if licence is not None and licence.id is not None and not data.license:
        data.license = licence.id
        if licence.name:
            data.license_name = licence.name
    entries = [entry for entry in data.eval_results or [] if entry.source_name != SOURCE]
    entries += [] if after is None else [entry for scores in after.tasks for entry in _model_index(scores)]
    data.eval_results = entries or None
    if entries:
        data.model_name = data.model_name or folder.resolve().name


def _model_index(scores: TaskScores) -> Iterator[EvalResult]:
    """Yield the model-index entries of a task's usual metrics as plain floats, on MTEB's scale of 0 to 100."""
    usual = [metric for metric in METRIC_LABELS if metric in scores.metrics]
    for metric in dict.fromkeys([*usual, scores.main_metric]):
        yield EvalResult(
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
            **_SOURCE,
        )


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
            common: dict[str, Any] = {
                "dataset_id": dataset,
                "value": round(100 * float(scores.main_score), 5),
                "dataset_revision": scores.dataset_revision,
                "date": after.created,
                "notes": f"{METRIC_LABELS.get(scores.main_metric, scores.main_metric)} times 100, through MTEB",
                **_SOURCE,
            }
            ids = (scores.task, f"{scores.task}_{scores.subset}_{scores.split}")
            tasks.setdefault(scores.task, []).extend(EvalResultEntry(task_id=id, **common) for id in ids)
    written = []
    for task, entries in tasks.items():
        path = target / f"{file_name(re.sub(r'[^A-Za-z0-9_.-]', '_', task))}.yaml"
        if not path.exists():  # else it is somebody else's: MTEB writes files of this name as well
            text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)
            written.append(write_text(path, _OURS + text))
    return written


def _dataset_of(scores: TaskScores) -> str | None:
    """Return the dataset on the Hub that was evaluated on, if it was one."""
    return _hub_dataset(scores.task) if _COMMIT.fullmatch(scores.dataset_revision) else None


@functools.cache
def _hub_dataset(task: str) -> str | None:
    """Return the dataset of a task that MTEB knows by name; a task of ours or a variant of one has none."""
    import mteb  # takes seconds, which a card without results of MTEB's tasks need not

    try:
        path = mteb.get_task(task).metadata.dataset["path"]
    except (KeyError, ValueError):
        return None
    return path if is_hub_id(path) else None


def with_changes(content: str, card: RepoCard, source: str | None = None) -> str:
    """Return a card's text with the changes that were made to `card`, which was read from it.

    Args:
        content: The card as its owner wrote it.
        card: The same card with other `text` and `data`.
        source: Name that marks the entries of the model-index that may be replaced; those of others stay.

    Raises:
        ValueError: If a change cannot be made without changing what the owner wrote, as where a list that is added to
            is used again by its anchor.
    """
    match = REGEX_YAML_BLOCK.search(content)
    if not match or not match.group(2).strip():
        return str(card)
    before, after = type(card)(content, ignore_metadata_errors=True).data.to_dict(), card.data.to_dict()
    block, changed = match.group(2), [key for key in {**before, **after} if before.get(key) != after.get(key)]
    newline = "\r\n" if "\r\n" in content else "\n"
    for key in changed:
        text = _with_results(block, card, source, newline) if key == _INDEX and source else None
        block = text or _changed(block, key, after.get(key), newline)
    _check(match.group(2), block, {key: after.get(key) for key in changed if key != _INDEX})
    return content[: match.start(2)] + block + content[match.end(2) : match.end()] + card.text


def _check(old: str, new: str, changes: Mapping[str, Any]) -> None:
    try:
        was, now = yaml.safe_load(f"{old}\n"), yaml.safe_load(f"{new}\n")
        kept = was.keys() - changes.keys() - {_INDEX}
        wrong = [key for key in kept if repr(was[key]) != repr(now.get(key))]
        wrong += [key for key, value in changes.items() if now.get(key) != value]
    except yaml.YAMLError:
        wrong = list(changes)
    if wrong:
        raise ValueError(
            f"README.md: st-wkl has to change {', '.join(changes) or _INDEX} in the front matter, which would change "
            f"what stands at {', '.join(map(str, wrong))}. If an anchor (&name) ties them together, write both out."
        )


def _changed(block: str, key: str, value: Any, newline: str) -> str:
    """Return the YAML text with another value of one key; None takes the key away."""
    tree = yaml.compose(block, Loader=yaml.SafeLoader)
    pairs = tree.value if isinstance(tree, yaml.MappingNode) else []
    place = next((number for number, (name, _) in enumerate(pairs) if name.value == key), None)
    if place is None:
        return block if value is None else f"{block}{newline}{_dump({key: value}, 0, newline).rstrip()}"
    name, node = pairs[place]
    following = pairs[place + 1][0].start_mark.index if place + 1 < len(pairs) else len(block)
    start, end = name.start_mark.index, _end(block, name.end_mark.index, following)
    own = name.end_mark.index <= node.start_mark.index <= end  # else it is an alias
    if value is None:
        rest = block[end:]
        return block[:start] + rest.lstrip("\r\n") if start == 0 else block[:start].rstrip("\r\n") + rest
    if own and isinstance(node, yaml.SequenceNode) and (text := _longer(block, node, value, end, newline)):
        return text
    if own and isinstance(node, yaml.ScalarNode) and isinstance(value, str) and node.style not in ("|", ">"):
        gap = "" if node.start_mark.index > name.end_mark.index + 1 else " "
        return block[: node.start_mark.index] + gap + _inline(value) + block[node.end_mark.index :]
    return block[:start] + _dump({key: value}, 0, newline).rstrip() + block[end:]


def _longer(block: str, node: yaml.SequenceNode, value: Any, end: int, newline: str) -> str | None:
    """Return the text with a list's new items behind those that it has, None if it is not merely longer."""
    had = yaml.safe_load(yaml.serialize(node))
    if not isinstance(value, list) or not had or value[: len(had)] != had:
        return None
    added = value[len(had) :]
    if node.flow_style:
        last = node.value[-1]
        alias = not node.start_mark.index < last.start_mark.index < node.end_mark.index
        at = node.end_mark.index - 1 if alias else last.end_mark.index
        return block[:at] + "".join(f", {_inline(item)}" for item in added) + block[at:]
    return block[:end] + newline + _dump(added, node.start_mark.column, newline).rstrip() + block[end:]


def _with_results(block: str, card: RepoCard, source: str, newline: str) -> str | None:
    """Return the text with the results of `source` replaced, None where the others' are not written in blocks."""
    results: list[Any] = getattr(card.data, "eval_results", None) or []
    ours = [entry for entry in results if entry.source_name == source]
    new = eval_results_to_model_index("", ours)[0]["results"] if ours else []
    index = dict(_pairs(yaml.compose(block, Loader=yaml.SafeLoader), block)).get(_INDEX)
    models = index[0].value if index and isinstance(index[0], yaml.SequenceNode) and not index[0].flow_style else []
    if len(models) != 1 or len(ours) == len(results):
        return None
    node, stop = dict(_pairs(models[0], block[: index[1]])).get("results", (None, 0)) if index else (None, 0)
    if not isinstance(node, yaml.SequenceNode) or node.flow_style or not node.value:
        return None
    starts = [block.rindex("-", 0, item.start_mark.index) for item in node.value]
    ends = [_end(block, *span) for span in zip(starts, [*starts[1:], stop], strict=True)]
    parts = [
        block[start:end]
        for start, end, item in zip(starts, ends, node.value, strict=True)
        if _source(yaml.safe_load(yaml.serialize(item))) != source
    ]
    parts += [_dump(new, node.start_mark.column, newline).strip()] if new else []
    return block[: starts[0]] + f"{newline}{' ' * node.start_mark.column}".join(parts) + block[ends[-1] :]


def _pairs(node: Any, block: str) -> Iterator[tuple[str, tuple[yaml.Node, int]]]:
    """Yield each key of a mapping that is written in a block with its value's node and where the next key begins."""
    pairs = node.value if isinstance(node, yaml.MappingNode) and not node.flow_style else []
    for place, (name, value) in enumerate(pairs):
        yield name.value, (value, pairs[place + 1][0].start_mark.index if place + 1 < len(pairs) else len(block))


def _source(result: Any) -> Any:
    source = result.get("source") if isinstance(result, Mapping) else None
    return source.get("name") if isinstance(source, Mapping) else None


def _end(block: str, start: int, following: int) -> int:
    """Return where the last line ends that is neither empty nor a comment on what follows."""
    lines = block[start:following].splitlines(keepends=True)
    while len(lines) > 1 and (not lines[-1].strip() or lines[-1].lstrip().startswith("#")):
        lines.pop()
    return start + len("".join(lines).rstrip())


def _inline(value: Any) -> str:
    """Return a value as it stands within a line."""
    text = yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=10**9).strip()
    return text.removeprefix("[").removesuffix("]")


def _dump(value: Any, column: int, newline: str) -> str:
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=10**9)
    return "".join(f"{' ' * column}{line}{newline}" for line in text.splitlines())
