"""The model card: what sentence-transformers writes, and one block on the distillation and its results."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from st_wkl.evaluation.compare import Comparison
from st_wkl.evaluation.results import Results
from st_wkl.files import write_text
from st_wkl.markdown import (
    linked,
    listed,
    markdown_block,
    markdown_cell,
    markdown_code,
    markdown_text,
    without_local_paths,
)
from st_wkl.publish._front_matter import with_changes
from st_wkl.publish._metadata import SOURCE, adapter_settings, fill_front_matter, name_of, write_eval_results
from st_wkl.publish._results import compared_task, parts_of, results_section
from st_wkl.publish._texts import model_class, usage, with_usage, without_training_texts
from st_wkl.publish._weights import check_results, marker
from st_wkl.publish.licences import Licence, licence_of
from st_wkl.reading import check_keys

if TYPE_CHECKING:
    from st_wkl.record import TrainingRecord

BEGIN, END = "<!-- st-wkl:begin -->", "<!-- st-wkl:end -->"
_BLOCK = re.compile(rf"{BEGIN}.*?{END}", re.DOTALL)


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
            `"after"`, or the only ones, go into the `model-index` and, for tasks on the Hub, `.eval_results/*.yaml`.
        comparison: The paired difference between after and before.
        notes: What a reader must know to read the numbers, a paragraph each, such as that the documents of the test
            queries were seen in training.
        command: The command that gives this model.
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
            different data or different students are mixed, or the weights in the folder were changed after these
            results were measured; the card stays as it is.

    Example:
        >>> write_model_card("student", record=None, results={"after": Results.load("student")})  # doctest: +SKIP
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder; save the model there first")
    if comparison is not None:
        compared_task(comparison, results)
    path = folder / "README.md"
    written, card = read_card(path, title=folder.resolve().name)
    after = results.get("after") or (next(iter(results.values())) if len(results) == 1 else None)
    if after is not None:
        check_results(folder, after, trust_remote_code=trust_remote_code)
    licence = None if record is None and licences is None else licence_of(_licences(record, licences))
    own = _BLOCK.sub("", card.text)
    block = _block(
        folder,
        record,
        results,
        comparison,
        notes,
        command,
        licence,
        str(getattr(card.data, "license", None) or ""),
        own,
    )
    if after is not None and (line := marker(after)):
        block = block.replace(END, f"{line}\n\n{END}")
    if not keep_samples:
        card.text = with_usage(without_training_texts(card.text), folder)
        card.data.widget = None  # type: ignore[attr-defined]
    card.text = _with_block(card.text, block, path)
    fill_front_matter(card, folder, record, after, licence)
    content = without_local_paths(with_changes(written, card, SOURCE), folder)
    ModelCard(content)  # what the Hub cannot read must not replace what it can
    write_text(path, content)
    if after is not None:
        write_eval_results(folder, after)
    return path


def _licences(record: TrainingRecord | None, stated: Mapping[str, str | None] | None) -> dict[str, str | None]:
    data = record.dataset if record is not None else {}
    student = record.student_license if record is not None else ""
    known = {"student": student or None, "teacher": data.get("teacher_license"), "training data": data.get("license")}
    return {**known, **(stated or {})}


def read_card(path: Path, title: str) -> tuple[str, ModelCard]:
    """Return the card in `path`, as it is written and as it is read, or say in which line it is broken."""
    content = f"---\nlibrary_name: sentence-transformers\n---\n\n# {markdown_text(title)}\n"
    if path.exists():
        content = path.read_bytes().decode("utf-8-sig")  # bytes, as text mode would change the line endings
    remedy = "correct it, or delete the file and save the model again"
    if content.lstrip().startswith("---") and not REGEX_YAML_BLOCK.search(content):
        raise ValueError(f"{path}:1: the front matter that begins here has no closing ---; {remedy}")
    try:
        if match := REGEX_YAML_BLOCK.search(content):
            check_keys(yaml.compose(match.group(2), Loader=yaml.SafeLoader), line=2)
        return content, ModelCard(content)
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
    folder: Path,
    record: TrainingRecord | None,
    results: Mapping[str, Results],
    comparison: Comparison | None,
    notes: Sequence[str],
    command: str | None,
    licence: Licence | None,
    stated: str,
    text: str,
) -> str:
    """Return the block with its markers; `text` is the rest of the card, whose citations are not repeated."""
    parts = ["## Distillation"]
    if record is not None:
        parts += _about_training(record, folder)
    if "## Usage" not in text:
        parts += ["### Usage", usage(folder)]
    task = None if comparison is None else compared_task(comparison, results)
    if any(entry.tasks for entry in results.values()):
        parts += ["### Results", results_section(results, told=task)]
    if comparison is not None:
        where = f" on {markdown_text(task)}" if task else ""
        parts.append(
            f"Difference{where}, after − before: {comparison}. The interval is "
            "Student's t over queries, p comes from a paired randomisation test."
        )
    parts += list(notes)
    parts += ["### Limits", "\n".join(f"- {limit}" for limit in _limits(folder, record, results, comparison))]
    if licence is not None:
        parts += ["### Licence", licence.why]
        if stated and stated != licence.id:
            parts.append(f"The owner of this card states {markdown_code(stated)}.")
    if command:
        parts += ["### How to reproduce", markdown_block("bash", command)]
    if record is not None and record.loss_citation:
        keys = re.findall(r"@\w+\{([^,\s]+),", record.loss_citation)
        if not keys or any(key not in text for key in keys):
            parts += [f"### Citation of {markdown_text(record.loss)}", markdown_block("bibtex", record.loss_citation)]
    # A name that holds the marker would end the block, and no card could be written over it.
    text = "\n\n".join(parts).replace("<!-- st-wkl:", "<! -- st-wkl:")
    return f"{BEGIN}\n\n{text}\n\n{END}"


def _limits(
    folder: Path, record: TrainingRecord | None, results: Mapping[str, Results], comparison: Comparison | None
) -> Iterator[str]:
    """Yield what the numbers do not say, as far as it can be known."""
    tasks = list(dict.fromkeys(scores.task for entry in results.values() for scores in entry.tasks))
    if tasks:
        listed = ", ".join(map(markdown_text, tasks[:5])) + (f" and {len(tasks) - 5} more" if len(tasks) > 5 else "")
        yield f"Measured on {listed} only; other domains, languages and lengths of text were not looked at."
    else:
        yield "Nothing has been measured yet: how well this model retrieves is not known."
    for task in tasks:
        columns = {n: scores for n, entry in results.items() for scores in entry.tasks if scores.task == task}
        count = min((len(scores.per_query) for scores in columns.values() if scores.per_query), default=0)
        if shared := len(parts_of(columns).get("shared", [])):
            asked = f"{shared:,} of {count:,} test queries"
            yield f"{markdown_text(task)}: {asked} ask for documents that training has shown."
        if 0 < count < 100:
            yield f"{markdown_text(task)}: {count} queries are few; look at the intervals."
    if comparison is not None and comparison.may_be_chance:
        why = "its interval holds 0" if comparison.holds_0 else f"p = {comparison.p_value:.2g}"
        yield f"The difference between before and after may be chance: {why}."
    if record is not None and "precision_at_1" in (record.dataset.get("report") or {}):
        wrong = 1 - record.dataset["report"]["precision_at_1"]
        yield (
            f"The student learns the teacher's errors, too: for {wrong:.1%} of the training queries the document that "
            "the teacher puts first is not judged relevant (some of them are relevant and nobody has judged them)."
        )
    if length := _max_length(folder):
        yield f"Texts are cut after {length:,} tokens."
    if model_class(folder) == "CrossEncoder" and tasks:
        yield "A reranker's numbers hold for the candidates that it was given: another first stage gives others."


def _max_length(folder: Path) -> int | None:
    for name, key in (("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length")):
        try:
            length = json.loads((folder / name).read_text(encoding="utf-8")).get(key)
        except (OSError, ValueError, AttributeError):
            continue
        if isinstance(length, int) and 0 < length < 10**6:  # transformers writes 1e30 for "no limit"
            return length
    return None


def _about_training(record: TrainingRecord, folder: Path) -> list[str]:
    """Return a sentence and a table on how the model was trained."""
    teacher, collection = name_of(record.teacher), name_of(record.dataset)
    rows = [
        ("Student", listed(record.student, {"licence": record.student_license})),
        ("Loss", listed(record.loss, record.loss_config)),
        ("Teacher", listed(teacher, {**record.teacher, "licence": record.dataset.get("teacher_license")})),
        ("Data", _about_data(collection, record.dataset)),
        ("LoRA", _about_adapter(record) or listed(None, adapter_settings(folder))),
        ("Prompts", listed(None, record.prompts)),
        ("Training", listed(None, record.arguments)),
        ("Training time", f"{record.seconds:.1f} seconds"),
        ("Versions", listed(None, record.versions)),
    ]
    lines = [f"| {name} | {markdown_cell(value)} |" for name, value in rows if value]
    table = "\n".join(["| | |", "| :-- | :-- |", *lines])
    return [
        f"This model is {markdown_code(record.student)}, taught with {markdown_code(record.loss)} to rank documents as "
        f"the {markdown_text(str(record.teacher.get('kind') or 'teacher'))} {markdown_code(teacher)} does, on queries "
        f"of {markdown_code(collection)}. It was made with st_wkl on top of sentence-transformers.",
        table,
    ]


def _about_adapter(record: TrainingRecord) -> str:
    """Return a line on the adapter, empty where all weights were trained."""
    lora = record.lora
    if not lora:
        return ""
    what = "merged into" if lora.get("merged") else "on"
    rank = f"rank `{lora['rank']}`, alpha `{lora['alpha']}`"
    return (
        f"{what} {markdown_code(record.student)}: {rank}, {lora['trainable']:,} weights trained ({lora['share']:.2%})"
    )


def _about_data(collection: str, provenance: Mapping[str, Any]) -> str:
    """Return a line on where the training lists came from, how many there are, and how good the teacher is on them."""
    counts, report = provenance.get("counts") or {}, provenance.get("report") or {}
    sources = (provenance.get("candidates") or {}).get("sources") or {}
    dropped = {what: number for what, number in (provenance.get("dropped") or {}).items() if number}
    parts = [
        linked(collection, "datasets/")
        + (f", split {markdown_code(provenance['split'])}" if "split" in provenance else "")
    ]
    parts += [f"{counts[what]:,} {what}" for what in ("queries", "documents") if what in counts]
    if "pairs" in counts:
        parts.append(f"{counts['pairs']:,} scored pairs")
    if sources:
        parts.append(f"candidates of {', '.join(map(markdown_text, sources))}")
    if provenance.get("license"):
        parts.append(f"licence {markdown_code(provenance['license'])}")
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
