"""The model card: what sentence-transformers writes, and one block on the distillation and its results."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from st_wkl._files import write_text
from st_wkl.evaluation.results import METRIC_LABELS, Comparison, Results, markdown_cell, results_table

if TYPE_CHECKING:
    from st_wkl.training.record import TrainingRecord

BEGIN, END = "<!-- st-wkl:begin -->", "<!-- st-wkl:end -->"
_BLOCK = re.compile(rf"{BEGIN}.*?{END}", re.DOTALL)
# Marks our entries in the model-index, so that writing the card again replaces them and leaves others alone.
_SOURCE, _SOURCE_URL = "st-wkl", "https://pypi.org/project/st-wkl/"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Folders that only mean something on one machine; those of this one are added when a card is written.
_LOCAL_ROOTS = ("/home", "/Users", "/root", "/tmp", "/mnt", "/media", "/scratch", "/private", "/var/folders")
_SYSTEM_ROOTS = {"/", "/usr", "/etc", "/bin", "/dev", "/opt", "/lib"}


def write_model_card(
    folder: str | Path,
    *,
    record: TrainingRecord | None,
    results: Mapping[str, Results],
    comparison: Comparison | None = None,
    notes: Sequence[str] = (),
    command: str | None = None,
) -> Path:
    """Add the distillation and its results to the card of a saved model.

    The card that `save_pretrained` wrote stays as it is, except for one block between `<!-- st-wkl:begin -->` and
    `<!-- st-wkl:end -->` before "## Model Details", and for the front matter, which gets tags, base model, datasets
    and a `model-index`. Writing again replaces the block and keeps everything else. Paths of this machine are cut to
    their last part.

    Args:
        folder: Folder of the saved model. Without a README.md a small one is written.
        record: How the model was trained; None for results only.
        results: Label of the table's row, such as `"before"`, `"after"`, `"BM25"`, to results. Those called `"after"`,
            or the only ones, go into the `model-index`.
        comparison: The paired difference between after and before.
        notes: What a reader must know to read the numbers, a paragraph each, such as that the documents of the test
            queries were seen in training.
        command: The command that gives this model.

    Returns:
        Path of the card.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If the card's front matter or the block's markers are broken, with file and line; the card stays
            as it is.

    Example:
        >>> write_model_card("student", record=None, results={"after": Results.load("student")})  # doctest: +SKIP
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder; save the model there first")
    path = folder / "README.md"
    card = _read_card(path, title=folder.resolve().name)
    block = _block(record, results, comparison, notes, command, text=_BLOCK.sub("", card.text))
    card.text = _with_block(card.text, block, path)
    _fill_front_matter(card, folder, record, results)
    content = without_local_paths(str(card), folder)
    ModelCard(content)  # what the Hub cannot read must not replace what it can
    return write_text(path, content)


def _read_card(path: Path, title: str) -> ModelCard:
    """Return the card in `path`, or say in which line it is broken."""
    if not path.exists():
        return ModelCard(f"---\nlibrary_name: sentence-transformers\n---\n\n# {title}\n")
    content = path.read_bytes().decode("utf-8-sig")  # bytes, as text mode would change the line endings
    remedy = "correct it, or delete the file and save the model again"
    if content.lstrip().startswith("---") and not REGEX_YAML_BLOCK.search(content):
        raise ValueError(f"{path}:1: the front matter that begins here has no closing ---; {remedy}")
    try:
        return ModelCard(content)
    except yaml.MarkedYAMLError as error:
        line = (error.problem_mark.line if error.problem_mark else 0) + 2  # counted from 0, after the opening ---
        raise ValueError(f"{path}:{line}: the front matter is not valid YAML ({error.problem}); {remedy}") from error
    except ValueError as error:
        found = [number for number, text in enumerate(content.splitlines(), 1) if text.startswith("model-index")]
        line = found[0] if "model_index" in str(error) and found else 1
        raise ValueError(f"{path}:{line}: the front matter cannot be read ({error}); {remedy}") from error


def _with_block(text: str, block: str, path: Path) -> str:
    """Return the card's text with the block in place of the last one, before the details, or at the end."""
    newline = "\r\n" if "\r\n" in text else "\n"
    block = block.replace("\n", newline)
    if text.count(BEGIN) != text.count(END) or text.count(BEGIN) != len(_BLOCK.findall(text)) or text.count(BEGIN) > 1:
        wrong = [n for n, line in enumerate(_raw_lines(path), 1) if BEGIN in line or END in line]
        raise ValueError(
            f"{path}:{wrong[0] if wrong else 1}: the card needs {BEGIN} and {END} once each, in this order "
            f"(found in lines {', '.join(map(str, wrong))}); remove the broken ones"
        )
    if BEGIN in text:
        return _BLOCK.sub(lambda _: block, text)
    details = re.search(r"^## Model Details[ \t]*\r?$", text, re.MULTILINE)
    if details:
        return f"{text[: details.start()]}{block}{newline * 2}{text[details.start() :]}"
    return f"{text.rstrip()}{newline * 2}{block}{newline}"


def _raw_lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8-sig").splitlines() if path.exists() else []


def _block(
    record: TrainingRecord | None,
    results: Mapping[str, Results],
    comparison: Comparison | None,
    notes: Sequence[str],
    command: str | None,
    *,
    text: str,
) -> str:
    """Return the block with its markers; `text` is the rest of the card, whose citations are not repeated."""
    parts = [BEGIN, "## Distillation"]
    if record is not None:
        parts += _about_training(record)
    if any(entry.tasks for entry in results.values()):
        parts += ["### Results", results_table(results)]
    if comparison is not None:
        parts.append(
            f"Difference, after − before: {comparison}. The interval is a bootstrap over queries, p comes from a "
            "paired randomisation test."
        )
    parts += list(notes)
    if command:
        parts += ["### How to reproduce", f"```bash\n{command.strip()}\n```"]
    if record is not None and record.loss_citation:
        keys = re.findall(r"@\w+\{([^,\s]+),", record.loss_citation)
        if not keys or any(key not in text for key in keys):
            parts += [f"### Citation of {record.loss}", f"```bibtex\n{record.loss_citation.strip()}\n```"]
    return "\n\n".join([*parts, END])


def _about_training(record: TrainingRecord) -> list[str]:
    """Return a sentence and a table on how the model was trained."""
    teacher, collection = _name_of(record.teacher), _name_of(record.dataset)
    rows = [
        ("Student", f"`{record.student}`"),
        ("Loss", _listed(record.loss, record.loss_config)),
        ("Teacher", _listed(teacher, record.teacher)),
        ("Data", _about_data(collection, record.dataset)),
        ("Training", _listed(None, record.arguments)),
        ("Training time", f"{record.seconds:.1f} seconds"),
        ("Versions", _listed(None, record.versions)),
    ]
    table = "\n".join(f"| {name} | {markdown_cell(value)} |" for name, value in rows if value)
    return [
        f"This model is `{record.student}`, taught with `{record.loss}` to rank documents as the "
        f"{record.teacher.get('kind') or 'teacher'} `{teacher}` does, on queries of `{collection}`. It was made with "
        "st_wkl on top of sentence-transformers.",
        f"| | |\n| :-- | :-- |\n{table}",
    ]


def _about_data(collection: str, provenance: Mapping[str, Any]) -> str:
    """Return a line on where the training lists came from, how many there are, and how good the teacher is on them."""
    counts, report = provenance.get("counts") or {}, provenance.get("report") or {}
    sources = (provenance.get("candidates") or {}).get("sources") or {}
    dropped = {what: number for what, number in (provenance.get("dropped") or {}).items() if number}
    parts = [f"`{collection}`" + (f", split `{provenance['split']}`" if "split" in provenance else "")]
    parts += [f"{counts[what]:,} {what}" for what in ("queries", "documents") if what in counts]
    if "pairs" in counts:
        parts.append(f"{counts['pairs']:,} scored pairs")
    if sources:
        parts.append(f"candidates of {', '.join(sources)}")
    if "num_negatives" in provenance:
        parts.append(f"up to {provenance['num_negatives']} negatives a query")
    if "precision_at_1" in report:
        parts.append(
            f"the teacher's best document is judged relevant for {report['precision_at_1']:.1%} of the queries"
        )
    if dropped:
        parts.append(
            "left out: " + ", ".join(f"{number:,} {what.replace('_', ' ')}" for what, number in dropped.items())
        )
    return "; ".join(parts)


def _name_of(description: Mapping[str, Any]) -> str:
    """Return what a teacher's identity or a dataset's provenance calls itself."""
    for key in ("name", "model", "collection"):
        value = description.get(key)
        if isinstance(value, Mapping):
            return _name_of(value)
        if value:
            return str(value)
    return "unknown"


def _listed(name: str | None, settings: Mapping[str, Any]) -> str:
    """Return `name` and the settings as one line of text."""
    items = [f"{key} `{value}`" for key, value in _flat(settings) if value != name]
    return ": ".join(part for part in (f"`{name}`" if name else "", ", ".join(items)) if part)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield every number, word and short list of nested settings with the path to it."""
    for key, value in settings.items():
        label = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{label}.")
        elif isinstance(value, float):
            yield label, f"{value:.6g}"
        elif isinstance(value, list | tuple):
            if value and len(value) <= 8 and all(isinstance(item, str | int | float) for item in value):
                yield label, ", ".join(map(str, value))
        elif value is not None and value != "":
            yield label, str(value)


def _fill_front_matter(
    card: ModelCard, folder: Path, record: TrainingRecord | None, results: Mapping[str, Results]
) -> None:
    """Add tags, base model, datasets and model-index; what is there stays."""
    data = cast(ModelCardData, card.data)
    tags = [data.tags] if isinstance(data.tags, str) else list(data.tags or [])
    tags += ["st-wkl", "knowledge-distillation"] if record else ["st-wkl"]
    if not is_hub_id(data.base_model):
        data.base_model = None
    if record is not None:
        tags.append(f"loss:{record.loss}")
        if data.base_model is None and is_hub_id(record.student):
            data.base_model = record.student
        collection = _name_of(record.dataset)
        if is_hub_id(collection):
            known = [data.datasets] if isinstance(data.datasets, str) else list(data.datasets or [])
            data.datasets = list(dict.fromkeys([*known, collection]))
    data.tags = list(dict.fromkeys(tags))
    after = results.get("after") or (next(iter(results.values())) if len(results) == 1 else None)
    foreign = [entry for entry in data.eval_results or [] if entry.source_name != _SOURCE]
    entries = foreign + (_eval_results(after) if after else [])
    data.eval_results = entries or None
    if entries:
        data.model_name = data.model_name or folder.resolve().name


def is_hub_id(value: Any) -> bool:
    """Say whether `value` is an id on the Hub and not a folder here."""
    if isinstance(value, list):
        return bool(value) and all(is_hub_id(item) for item in value)
    return isinstance(value, str) and bool(_HUB_ID.fullmatch(value)) and not Path(value).exists()


def _eval_results(results: Results) -> list[EvalResult]:
    """Return the model-index entries of the usual metrics, as plain floats."""
    entries = []
    for scores in results.tasks:
        metrics = [metric for metric in METRIC_LABELS if metric in scores.metrics]
        if scores.main_metric not in metrics:
            metrics.append(scores.main_metric)
        commit = scores.dataset_revision if re.fullmatch(r"[0-9a-f]{40}", scores.dataset_revision) else None
        entries += [
            EvalResult(
                task_type="information-retrieval",
                task_name="Information Retrieval",
                dataset_type=scores.task,
                dataset_name=scores.task,
                dataset_config=None if scores.subset == "default" else scores.subset,
                dataset_split=scores.split,
                dataset_revision=commit,
                metric_type=metric,
                metric_name=METRIC_LABELS.get(metric, metric),
                metric_value=round(float(scores.metrics[metric]), 5),
                source_name=_SOURCE,
                source_url=_SOURCE_URL,
            )
            for metric in metrics
        ]
    return entries


def without_local_paths(content: str, folder: Path) -> str:
    """Return the card with each path of this machine cut to its last part."""
    here = {f"/{place.parts[1]}" for place in (folder.resolve(), Path.cwd(), Path.home()) if len(place.parts) > 1}
    temporary = {tempfile.gettempdir()}
    roots = sorted({*_LOCAL_ROOTS, *here, *temporary} - _SYSTEM_ROOTS, key=len, reverse=True)
    any_root = "|".join(map(re.escape, roots))
    # A model that was loaded from a folder is linked as if the folder were a Hub id.
    content = re.sub(r"\[[^\]]*\]\(https://huggingface\.co//([^)]*)\)", lambda m: f"`{_last_part(m[1])}`", content)
    unix = rf"""(?<![\w/.:~-])(?:file://)?(?:{any_root})/[^\s"'`()<>\[\]|,;:]+"""
    windows = r"""(?<!\w)[A-Za-z]:\\[^\s"'`()<>\[\]|,;:]+"""
    return re.sub(f"{unix}|{windows}", lambda match: _last_part(match[0]), content)


def _last_part(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]
