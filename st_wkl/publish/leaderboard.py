"""From a student's folder and MTEB's results to a folder with everything that the two pull requests hold."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from st_wkl.files import replacing_folder
from st_wkl.markdown import is_hub_id
from st_wkl.publish.leaderboard_model import known_training_datasets, model_code, model_meta, variable_name
from st_wkl.publish.leaderboard_results import collect, result_folders, task_files
from st_wkl.record import RECORD_FILE, TrainingRecord

if TYPE_CHECKING:
    from mteb.models import ModelMeta

_PAGE = "PULL_REQUESTS.md"
_SCRIPT = "evaluate.py"
_BENCHMARKS = ("MTEB(eng, v2)", "BEIR", "NanoBEIR")


@dataclass(frozen=True)
class Submission:
    """What `prepare` wrote.

    Args:
        folder: Where everything is.
        meta: MTEB's description of the student.
        model_file: The Python file of the first pull request.
        results: The revision folder of the second one; None if no results were given yet.
        tasks: Names of the tasks in it.
        page: The page that says what to do.
        notes: What a reviewer will ask about.
    """

    folder: Path
    meta: ModelMeta
    model_file: Path
    results: Path | None
    tasks: tuple[str, ...]
    page: Path
    notes: tuple[str, ...]


def prepare(
    student: str | Path,
    results: Iterable[str | Path] = (),
    *,
    org: str,
    output: str | Path,
    name: str | None = None,
    revision: str | None = None,
    license: str | None = None,
    trained_on: Iterable[str] | None = None,
    training_data: str | None = None,
    languages: Sequence[str] = ("eng-Latn",),
    release_date: str | None = None,
    contacts: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> Submission:
    """Write the model's entry for MTEB, its results in the repository's layout, and a page on the two pull requests.

    Nothing is sent anywhere. Results must come from MTEB itself; without any, the folder holds the entry and a script
    that computes them as the reviewers do, through `mteb.get_model`, and `prepare` is called again with what it wrote.

    Args:
        student: Folder of the trained student, as it was pushed.
        results: Folders with MTEB's result files: a cache, or a part of one.
        org: User or organisation under which the student is on the Hub.
        output: New folder, or one that `prepare` wrote, which is replaced.
        name: Name of the repository. Default: that of the student's folder.
        revision: Commit of the student on the Hub. Default: the Hub is asked for the newest one.
        license: Licence of the student. Default: that of its card.
        trained_on: Further MTEB tasks whose data the student, its teacher or its base has seen; an empty list says
            that there are none beyond what MTEB knows. See `known_training_datasets`.
        training_data: URL of the training data. Default: that of the collection, if it is on the Hub.
        languages: As MTEB writes them, language and script.
        release_date: `YYYY-MM-DD`. Default: today in UTC.
        contacts: GitHub handles of those who answer for the model.
        trust_remote_code: Run code of the student's folder. Only for code that you have read.

    Raises:
        FileExistsError: If `output` holds something else.
        FileNotFoundError: If a folder does not exist, or the student is not on the Hub.
        ValueError: If a field is missing or wrong, results are damaged or another model's, or the results repository
            would refuse them; the message lists what is wrong. Nothing is written then.

    Example:
        >>> submission = prepare("student", ["mteb-cache"], org="lab", output="submission")  # doctest: +SKIP
        >>> print(submission.page.read_text())  # doctest: +SKIP
    """
    from st_wkl.models import load_model, model_revision

    student, output = Path(student).expanduser(), Path(output).expanduser()
    if not student.is_dir():
        raise FileNotFoundError(f"{student}: there is no such folder; pass the folder of the trained student")
    if output.exists() and not (output / _PAGE).is_file() and (output.is_file() or any(output.iterdir())):
        raise FileExistsError(f"{output} holds something that `prepare` did not write; choose another folder")
    sources = list(results)
    result_folders(sources)  # before the model is loaded
    repo_id = f"{org}/{name or student.resolve().name}"
    record = TrainingRecord.load(student) if (student / RECORD_FILE).is_file() else None
    licence = license or _card_license(student)
    seen, notes = known_training_datasets(record, trained_on)
    model, _ = load_model(student, trust_remote_code=trust_remote_code)
    meta = model_meta(
        model,
        name=repo_id,
        revision=revision or _newest_commit(repo_id),
        license=licence,
        training_datasets=seen,
        adapted_from=record.student if record and is_hub_id(record.student) else None,
        training_data=training_data or _data_url(record),
        languages=languages,
        release_date=release_date,
        contacts=contacts,
    )
    if seen is None:
        notes.append(
            "So `training_datasets` is None (unknown), and the leaderboard cannot say on which tasks the model is "
            "zero-shot. Name what is missing with `--trained-on TASK`, or `--trained-on none` if nothing is."
        )
    if meta.public_training_data is False:
        notes.append("No link to public training data; give one with `--training-data URL` if there is one.")
    return _write(output, meta, sources, model_revision(model), notes)


def _write(output: Path, meta: ModelMeta, sources: list[str | Path], weights: str, notes: list[str]) -> Submission:
    """Write everything to a temporary folder, check it there, and put it in its place."""
    with replacing_folder(output) as new:
        module = f"{re.sub(r'[^a-z0-9]+', '_', str(meta.name).split('/')[0].lower()).strip('_')}_models"
        (new / f"{module}.py").write_text(model_code(meta), encoding="utf-8")
        (new / _SCRIPT).write_text(_script(meta, module), encoding="utf-8")
        place = collect(sources, meta, weights, new) if sources else None
        tasks = tuple(file.stem for file in task_files(place)) if place else ()
        (new / _PAGE).write_text(_page(meta, module, tasks, notes), encoding="utf-8")
    return Submission(
        folder=output,
        meta=meta,
        model_file=output / f"{module}.py",
        results=output / place.relative_to(new) if place else None,
        tasks=tasks,
        page=output / _PAGE,
        notes=tuple(notes),
    )


def _card_license(student: Path) -> str:
    """Return the licence that the student's card names."""
    from st_wkl.publish.model_card import read_card

    path = student / "README.md"
    found = read_card(path, student.name)[1].data.to_dict().get("license")
    if not found:
        raise ValueError(f"{path} names no licence, which MTEB asks for; add one there or pass license= (--license)")
    if found == "other":
        raise ValueError(
            f"{path} says that the licence is `other`, which MTEB does not know; pass the address of its terms with "
            "license= (--license)"
        )
    return str(found[0] if isinstance(found, list) else found)


def _newest_commit(repo_id: str) -> str:
    """Ask the Hub for the commit whose results count."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi().model_info(repo_id).sha)
    except Exception as error:
        raise FileNotFoundError(
            f"the Hub does not tell the commit of {repo_id} ({type(error).__name__}). Push the student first, and "
            "publicly, as the leaderboard's reviewers load it; or pass its commit with revision= (--revision)"
        ) from error


def _data_url(record: TrainingRecord | None) -> str | bool:
    collection: Any = (record.dataset.get("collection") if record else None) or {}
    name = str(collection.get("name") if isinstance(collection, dict) else collection)
    return f"https://huggingface.co/datasets/{name}" if is_hub_id(name) else False


def _script(meta: ModelMeta, module: str) -> str:
    """Return a script that evaluates the student as the leaderboard's reviewers do."""
    variable = variable_name(meta)
    if "cross-encoder" in meta.model_type:
        default = '["AskUbuntuDupQuestions", "MindSmallReranking"]'
    else:
        default = '["NanoBEIR"]'
    return f'''"""Compute the results of {meta.name} through mteb.get_model, as the leaderboard asks; needs the Hub.

    python evaluate.py                  # {default}
    python evaluate.py "BEIR" SciFact   # benchmarks and tasks by name

Stop it at any time: finished tasks are kept in mteb-cache/.
"""

import sys

import mteb
from mteb.models.model_implementations import MODEL_REGISTRY

from {module} import {variable} as meta

MODEL_REGISTRY[meta.name] = meta
benchmarks = {{benchmark.name for benchmark in mteb.get_benchmarks()}}
tasks = []
for name in sys.argv[1:] or {default}:
    tasks += mteb.get_benchmark(name).tasks if name in benchmarks else [mteb.get_task(name)]
mteb.evaluate(mteb.get_model(meta.name, revision=meta.revision), tasks, cache=mteb.ResultCache("mteb-cache"))
'''


def _page(meta: ModelMeta, module: str, tasks: tuple[str, ...], notes: Sequence[str]) -> str:
    """Return the page that says what to do."""
    results = f"results/{str(meta.name).replace('/', '__')}/{meta.revision}/"
    size = f"{meta.n_parameters:,} parameters, {meta.n_embedding_parameters or 0:,} of them token embeddings"
    zero_shot = {} if meta.training_datasets is None else _zero_shot(meta)
    coverage = [
        f"- {name}: {done} of {total} tasks here" + (f", {zero_shot[name]} % zero-shot" if name in zero_shot else "")
        for name, done, total in _coverage(tasks)
        if done or name in zero_shot
    ]
    if tasks:
        second = f"Checked by the rules of that repository, {len(tasks)} in number: {', '.join(tasks)}."
    else:
        second = (
            f"There are none yet. Run `python {_SCRIPT}` in this folder, then `st-wkl leaderboard prepare` again with "
            "its `mteb-cache`."
        )
    return "\n".join(
        [
            f"# {meta.name} on MTEB's leaderboard",
            "",
            f"Commit `{meta.revision}`; {size}, {meta.memory_usage_mb:.0f} MB. Two pull requests are needed. The Hub "
            "repository must be public before you open them.",
            "",
            "## 1. The model: https://github.com/embeddings-benchmark/mteb",
            "",
            f"Copy `{module}.py` to `mteb/models/model_implementations/{module}.py`. If that file exists there, append "
            f"the entry `{variable_name(meta)}` to it. Read every field: it is your statement.",
            "",
            "```bash",
            "git clone https://github.com/embeddings-benchmark/mteb && cd mteb",
            f"git switch -c add-{variable_name(meta).replace('_', '-')}",
            f"cp ../{module}.py mteb/models/model_implementations/",
            f"python -c \"import mteb; print(mteb.get_model_meta('{meta.name}', '{meta.revision}'))\"",
            f'git add mteb/models && git commit -m "Add {meta.name}" && gh pr create',
            "```",
            "",
            "What went into `training_datasets`:",
            "",
            *(f"- {note}" for note in notes),
            "",
            "## 2. The results: https://github.com/embeddings-benchmark/results",
            "",
            second,
            "",
            *coverage,
            "",
            "Reviewers want results that were computed through `mteb.get_model`, which is what "
            f"`{_SCRIPT}` does. In this folder, which MTEB reads as a result cache:",
            "",
            "```python",
            "import mteb",
            f"from {module} import {variable_name(meta)} as meta",
            "",
            'mteb.ResultCache(".").submit_results(meta, create_pr=False)  # prints the commands for the pull request',
            "```",
            "",
            f"or copy `{results}` into a clone of that repository. Refer to the first pull request; results of a model "
            "that MTEB does not know yet are not merged.",
            "",
        ]
    )


def _coverage(tasks: Iterable[str]) -> list[tuple[str, int, int]]:
    """Return for each benchmark how many of its tasks are there."""
    import mteb

    done = set(tasks)
    members = {name: {task.metadata.name for task in mteb.get_benchmark(name).tasks} for name in _BENCHMARKS}
    return [(name, len(done & members[name]), len(members[name])) for name in _BENCHMARKS]


def _zero_shot(meta: ModelMeta) -> dict[str, int]:
    import mteb

    found = {name: meta.zero_shot_percentage(mteb.get_benchmark(name).tasks) for name in _BENCHMARKS}
    return {name: share for name, share in found.items() if share is not None}
