"""The model card: what sentence-transformers writes, and one block on the distillation and its results."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import TrainingArguments

from st_wkl import losses, markdown
from st_wkl.evaluation.compare import Comparison
from st_wkl.evaluation.results import Results
from st_wkl.files import write_text
from st_wkl.markdown import listed, markdown_code, markdown_text, without_local_paths
from st_wkl.models import saved_class, saved_settings
from st_wkl.publish.card_results import draw, measured
from st_wkl.publish.front_matter import SOURCE, fill_front_matter, read_card, with_changes, write_eval_results
from st_wkl.publish.licences import licence_of
from st_wkl.publish.saved import (
    check_results,
    marker,
    max_length,
    usage,
    without_training_texts,
)
from st_wkl.record import TrainingRecord

BEGIN, END = "<!-- st-wkl:begin -->", "<!-- st-wkl:end -->"
_BLOCK = re.compile(rf"{BEGIN}.*?{END}", re.DOTALL)
_TEMPLATES = Path(__file__).parent / "templates"
_ADAPTER = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "targets"}
# Of means that were rounded to 5 decimals on both sides.
_ROUNDING = 1e-4
# Weighted KL that weighs nothing, as the default loss is recorded.
_UNWEIGHTED = {"gamma": 0, "alpha": 0}
# The training arguments that are told at their defaults, too.
_TOLD = ("num_train_epochs", "per_device_train_batch_size", "learning_rate", "seed")


def write_model_card(
    folder: str | Path,
    *,
    record: TrainingRecord | None,
    results: Mapping[str, Results],
    comparison: Comparison | None = None,
    notes: Sequence[str] = (),
    command: str | None = None,
    licences: Mapping[str, str | None] | None = None,
    keep_samples: bool = False,
    trust_remote_code: bool = False,
) -> Path:
    """Add the distillation and its results to the card of a saved model.

    The card that `save_pretrained` wrote stays as it is, with four exceptions: one block between `<!-- st-wkl:begin
    -->` and `<!-- st-wkl:end -->` before "## Model Details"; the front matter, which gets tags, base model, datasets,
    licence and a `model-index`; the example, which becomes one for retrieval with this model class; and texts of the
    training data, which sentence-transformers copies into its cards although they may not be passed on. Writing again
    replaces the block and keeps everything else. Paths of this machine are cut to their last part.

    Args:
        folder: Folder of the saved model, or adapter. Without a README.md a small one is written.
        record: How the model was trained; None for results only.
        results: Label of the table's column, such as `"before"`, `"after"`, `"BM25"`, to results. Those called
            `"after"`, or the only ones, go into the `model-index` and, for tasks on the Hub, `.eval_results/*.yaml`;
            those called `"before"` must be of the model that the record names as its start.
        comparison: The paired difference between after and before, of the task that it names.
        notes: What a reader must know to read the numbers, a paragraph each, such as that the documents of the test
            queries were seen in training.
        command: The command that gives this model. Default: what the record says.
        licences: `"student"`, `"teacher"` and `"training data"` to their licences, see `licence_of`. Default: what the
            record says of the model that training started from, and the dataset's provenance of the other two. A
            licence that the card states already stays.
        keep_samples: Leave the samples and widget texts of the training data in the card.
        trust_remote_code: Run code of the folder to compare its weights with those of the results. Only for code that
            you have read.

    Returns:
        Path of the card.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If the card's front matter or the block's markers are broken, with file and line, results of
            different data or different students are mixed, those before are of another model than training started
            from, or the weights in the folder were changed after these results were measured; the card stays as it is.

    Example:
        >>> write_model_card("student", record=None, results={"after": Results.load("student")})  # doctest: +SKIP
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder; save the model there first")
    compared = _compared(comparison, results) if comparison is not None else ""
    path = folder / "README.md"
    written, card = read_card(path, title=folder.resolve().name)
    after = results.get("after") or (next(iter(results.values())) if len(results) == 1 else None)
    other_start = _other_start(record, results.get("before"))
    if after is not None:
        check_results(folder, after, trust_remote_code=trust_remote_code)
    licence = None
    if record is not None or licences is not None:
        licence = licence_of(_licences(record, licences or {}))
    values = {
        **(_about_training(record, folder) if record is not None else {"datasets": []}),
        **measured(results),
        "comparison": comparison,
        "compared": compared,
        "notes": notes,
        "other_start": other_start,
        "licence": licence,
        "stated": str(getattr(card.data, "license", None) or ""),
        "picture": draw(folder, results),
        "command": command or (record.command if record is not None else ""),
    }
    block = _block(folder, _BLOCK.sub("", card.text), record, values)
    parts = [BEGIN, block, marker(after) if after else "", END]
    if not keep_samples:
        card.text = without_training_texts(card.text, folder)
        card.data.widget = None  # type: ignore[attr-defined]
    card.text = _with_block(card.text, "\n\n".join(filter(None, parts)), path, written)
    collections = [name_of(data) for data in record.datasets.values()] if record else []
    fill_front_matter(card, folder, record, collections, after, licence)
    content = without_local_paths(with_changes(written, card, SOURCE), folder)
    ModelCard(content)  # what the Hub cannot read must not replace what it can
    write_text(path, content)
    if after is not None:
        write_eval_results(folder, after)
    return path


@contextmanager
def headed(student: Any, record: TrainingRecord) -> Iterator[None]:
    """Have a student saved with a card that says what it is, in place of sentence-transformers' general one."""
    data = student.model_card_data
    template, data.template_path = data.template_path, _TEMPLATES / "student.md.jinja"
    if data.model_name in (None, data.get_default_model_name()):  # which the first checkpoint has made
        data.model_name = _title(record)
    try:
        yield
    finally:
        data.template_path = template


def _title(record: TrainingRecord) -> str:
    """Return who learnt, from whom, on what."""
    teachers, data = name_of(record.teacher).split(" and "), [name_of(one) for one in record.datasets.values()]
    taught, on = (" and ".join(Path(name).name for name in names) for names in (teachers, dict.fromkeys(data)))
    return f"{Path(record.student).name} taught by {taught} on {on}"


def name_of(description: Mapping[str, Any]) -> str:
    """Return what a teacher's identity or a dataset's provenance calls itself; an ensemble's are those of its parts."""
    if "kind" in description and (parts := description.get("teachers") or description.get("teacher")):
        return " and ".join(map(name_of, parts if isinstance(parts, list) else [parts]))
    for key in ("name", "model", "collection"):
        value = description.get(key)
        if isinstance(value, Mapping):
            return name_of(value)
        if value:
            return str(value)
    return "unknown"


def _block(folder: Path, rest: str, record: TrainingRecord | None, values: Mapping[str, Any]) -> str:
    """Return our part of the card, without its markers; what the `rest` of it says is not repeated."""
    keys = re.findall(r"@\w+\{([^,\s]+),", record.loss_citation) if record is not None else []
    cited = bool(keys) and all(key in rest for key in keys)
    block = ModelCard.from_template(
        ModelCardData(library_name="sentence-transformers"),
        template_path=str(_TEMPLATES / "model_card.md.jinja"),
        markdown=markdown,
        usage="" if "## Usage" in rest else usage(folder),
        citation=record.loss_citation if record is not None and not cited else "",
        max_length=max_length(folder),
        reranks=saved_class(folder) == "CrossEncoder",
        **values,
    ).text
    # A name that holds the marker would end the block, and no card could be written over it.
    return block.strip().replace("<!-- st-wkl:", "<! -- st-wkl:")


def _compared(comparison: Comparison, results: Mapping[str, Results]) -> str:
    """Return the task that a comparison is of, `""` where nobody says; refuse one that is not between these results."""
    before, after = results.get("before"), results.get("after")
    if before is None or after is None:
        return comparison.task
    tasks = {scores.task for scores in before.tasks} & {scores.task for scores in after.tasks}
    task = comparison.task or (next(iter(tasks)) if len(tasks) == 1 else "")
    both, again = f"{after.name!r} minus {before.name!r}", "they belong to different students. Compare these two again"
    if task and task not in tasks:
        raise ValueError(f"the comparison is of {task}, which {both} is not: {again}")
    if any(comparison.revisions) and comparison.revisions != (before.model["revision"], after.model["revision"]):
        raise ValueError(f"the comparison is of other weights or settings than {both}: {again}")
    means = {(s.split, s.subset): s.metrics for s in before.tasks if s.task == task}
    for s in after.tasks:
        pair = (means.get((s.split, s.subset), {}).get(comparison.metric), s.metrics.get(comparison.metric))
        if s.task != task or comparison.group or comparison.split not in ("", s.split) or None in pair:
            continue
        found = float(pair[1] or 0) - float(pair[0] or 0)
        if abs(found - comparison.mean) > _ROUNDING:
            told = f"{comparison.mean:+.4f} {comparison.label}"
            raise ValueError(f"the comparison says {told}, but {both} is {found:+.4f}: {again}")
    return task


def _other_start(record: TrainingRecord | None, before: Results | None) -> str:
    """Say that the results before are of another model than training started from; refuse them where that is certain.

    Names may differ for one model, and prompts, lengths or number types of one model may: one of the two has to agree.
    """
    if record is None or before is None:
        return ""
    trained = record.identity.get("student")  # as it was trained: half precision is trained in float32
    same_name = Path(record.student).name.lower() == Path(before.name).name.lower()
    if same_name or trained == before.model["revision"]:
        return ""
    if trained and record.precision.get("loaded") == record.precision.get("trained"):
        raise ValueError(
            f"the results before are of {before.name!r} ({before.model['revision'][:8]}…), but the record says that "
            f"training started from {record.student!r} ({trained[:8]}…). Evaluate that model, or call the column "
            "something else than before, such as baseline=…"
        )
    return (
        f"The results before are of {markdown_code(before.name)}; the record calls the model that training started "
        f"from {markdown_code(record.student)}, and whether that is the same one is not known."
    )


def _with_block(text: str, block: str, path: Path, written: str) -> str:
    """Return the card's text with the block in place of the last one, before the details, or at the end."""
    newline = "\r\n" if "\r\n" in text else "\n"
    block = block.replace("\n", newline)
    if text.count(BEGIN) != text.count(END) or text.count(BEGIN) != len(_BLOCK.findall(text)) or text.count(BEGIN) > 1:
        wrong = [n for n, line in enumerate(written.splitlines(), 1) if BEGIN in line or END in line]
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


def _about_training(record: TrainingRecord, folder: Path) -> dict[str, Any]:
    """Return what the template tells of training beyond the record itself."""
    lora, config = record.lora, saved_settings(folder, "adapter_config.json")
    adapter = listed(None, {name: config.get(key) for key, name in _ADAPTER.items()})
    if lora:
        adapter = (
            f"{'merged into' if lora.get('merged') else 'on'} {markdown_code(record.student)}: rank `{lora['rank']}`, "
            f"alpha `{lora['alpha']}`, {lora['trainable']:,} weights trained ({lora['share']:.2%})"
        )
    several = len(record.datasets) > 1
    defaults = {entry.name: entry.default for entry in fields(TrainingArguments)}
    return {
        "record": record,
        "datasets": [_about_data(data, name if several else "") for name, data in record.datasets.items()],
        "teacher": name_of(record.teacher),
        "teacher_license": _licences(record, {}).get("teacher"),
        "adapter": adapter,
        "losses": list(_losses(record.loss, record.loss_config)),
        "arguments": {
            name: value
            for name, value in record.arguments.items()
            if name in _TOLD or (value or None) != (getattr(defaults.get(name), "value", defaults.get(name)) or None)
        },
    }


def _about_data(data: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return what the template tells of a dataset; of several by its name."""
    lost = {what.replace("_", " "): count for what, count in (data.get("dropped") or {}).items() if count}
    return {
        "name": name,
        "data": data,
        "collection": name_of(data),
        "sources": ", ".join(map(markdown_text, (data.get("candidates") or {}).get("sources") or {})),
        "left_out": ", ".join(f"{count:,} {what}" for what, count in lost.items()),
        "right": (data.get("report") or {}).get("precision_at_1"),
    }


def _licences(record: TrainingRecord | None, given: Mapping[str, str | None]) -> dict[str, str | None]:
    """Return the licence of each part: what somebody says, and what the record knows of the others."""
    if record is None:
        return {"student": None, "teacher": None, "training data": None, **given}
    known = {"student": record.student_license or None}
    for part, key in (("teacher", "teacher_license"), ("training data", "license")):
        stated = {name: data.get(key) for name, data in record.datasets.items()}
        if part in given or len({*stated.values()}) == 1:
            known[part] = next(iter(stated.values()))
        else:
            known |= {f"{part} of {markdown_code(name)}": licence for name, licence in stated.items()}
    return {**known, **given}


def _losses(name: str, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield each term of a loss with those of its parameters that are not at their defaults."""
    terms = {key: value for key, value in config.items() if isinstance(value, Mapping)}
    if name == "WeightedSumLoss" and terms:
        for term, options in terms.items():
            yield from _losses(term, options)
        return
    made = getattr(losses, name, None)
    defaults = {} if made is None else {key: one.default for key, one in inspect.signature(made).parameters.items()}
    plain = _UNWEIGHTED if name == "WeightedKLDistillationLoss" else {}
    if plain and all(config.get(key) == value for key, value in plain.items()):
        name, defaults = "KLDistillLoss", defaults | plain
    defaults |= {"weight": 1, "similarity_fct": config.get("similarity_fct")}
    yield listed(name, {key: value for key, value in config.items() if key not in defaults or value != defaults[key]})
