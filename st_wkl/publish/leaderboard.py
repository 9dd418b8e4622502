"""From a student's folder and MTEB's results to a folder with everything that the two pull requests hold.

Results are checked by the rules of https://github.com/embeddings-benchmark/results, its README and the tests that run
on its pull requests.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mteb
from huggingface_hub import HfApi
from mteb.models import ModelMeta
from mteb.results import TaskResult
from packaging.version import Version

from st_wkl.files import replacing_folder
from st_wkl.markdown import is_hub_id, without_local_paths
from st_wkl.models import load_model, model_revision
from st_wkl.publish import TEMPLATES
from st_wkl.publish.front_matter import read_card
from st_wkl.publish.leaderboard_model import known_training_datasets, model_meta
from st_wkl.publish.model_card import name_of
from st_wkl.publish.review import Coverage, coverage, mock_run, not_zero_shot, open_questions
from st_wkl.record import RECORD_FILE, TrainingRecord, collection_of

_PAGE = "PULL_REQUESTS.md"
_META, _SETTINGS = "model_meta.json", "run_settings.jsonl"
_MOCK = "mteb_mock_run_results.md"
_TEXTS = ("model_pull_request.md", "results_pull_request.md", "evaluation_request.md")
_LARGEST = 10 * 2**20
_OLDEST = Version("2.14.0")  # the first that writes run_settings.jsonl


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
        notes: What the student was trained on, and where that is known from.
        coverage: What it means for each benchmark: results, private tasks, and the share that is zero-shot.
        questions: What only you can say, which the checklists leave open.
    """

    folder: Path
    meta: ModelMeta
    model_file: Path
    results: Path | None
    tasks: tuple[str, ...]
    page: Path
    notes: tuple[str, ...]
    coverage: tuple[Coverage, ...]
    questions: tuple[str, ...]

    def __repr__(self) -> str:
        told = f"{len(self.tasks)} results, {len(self.questions)} open questions"
        return f"<Submission of {self.meta.name}: {told}; go on with {self.page}>"


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
    citation: str | Path | None = None,
    superseded_by: str | None = None,
    mock: bool = True,
    trust_remote_code: bool = False,
) -> Submission:
    """Write all that the two pull requests hold: entry, mock run, results, both texts with what can be ticked.

    A page says what to do and what only you can say; a retriever gets the request for RTEB's private tasks, too.
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
        citation: BibTeX of articles that exist, or a file of it. Default: the article of the loss, if it has one.
        superseded_by: Id of the model that is to be used in place of this one.
        mock: Run MTEB's mock tasks on the student, some thirty of a few texts each; reviewers ask for the outcome.
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
    student, output = Path(student).expanduser(), Path(output).expanduser()
    _check_folders(student, output)
    sources = list(results)
    result_folders(sources)  # before the model is loaded
    repo_id = f"{org}/{name or student.resolve().name}"
    record = TrainingRecord.load(student) if (student / RECORD_FILE).is_file() else None
    named = [collection_of(data) for data in record.datasets.values()] if record else []
    licence = license or _card_license(student)
    seen, notes = known_training_datasets(record, trained_on)
    if isinstance(citation, Path) or (citation and not citation.lstrip().startswith("@")):
        citation = Path(citation).expanduser().read_text(encoding="utf-8")
    commit, public = (revision, None) if revision else _newest_commit(repo_id)
    model, _ = load_model(student, trust_remote_code=trust_remote_code)
    meta = model_meta(
        model,
        name=repo_id,
        revision=commit,
        license=licence,
        training_datasets=seen,
        adapted_from=record.student if record and is_hub_id(record.student) else None,
        training_data=training_data or _public_data(named),
        languages=languages,
        release_date=release_date,
        contacts=contacts,
        citation=citation or (record.loss_citation.strip() or None if record else None),
        superseded_by=superseded_by,
        record=record,
    )
    module = f"{re.sub(r'[^a-z0-9]+', '_', org.lower()).strip('_')}_models"
    with replacing_folder(output) as new:  # checked there, before anything is replaced
        place = collect(sources, meta, model_revision(model), new) if sources else None
        tasks = tuple(file.stem for file in _task_files(place)) if place else ()
        checked = mock_run(model, meta) if mock else None
        reference = bool(place) and all(_about(folder)["name"] == repo_id for folder in result_folders(sources))
        rows = coverage(meta, seen, tasks)
        told: dict[str, Any] = {
            "module": module,
            "tasks": tasks,
            "notes": notes,
            "coverage": rows,
            "questions": open_questions(meta, checked, public, citation is not None, reference, bool(tasks)),
            "mock": checked,
            "public": public,
            "reference": reference,
            "disclosed": not_zero_shot(meta, seen, tasks),
            "origin": _origin(meta, record, ", ".join(named)),
        }
        _write(new, student, meta, told)
    written = (output / f"{module}.py", output / place.relative_to(new) if place else None, tasks, output / _PAGE)
    return Submission(output, meta, *written, tuple(notes), tuple(rows), tuple(told["questions"]))


def _public_data(collections: list[str]) -> str | bool:
    """Return where the training data are on the Hub, True for several places, False if some are not there."""
    there = bool(collections) and all(map(is_hub_id, collections))
    return f"https://huggingface.co/datasets/{collections[0]}" if there and len(collections) == 1 else there


def _check_folders(student: Path, output: Path) -> None:
    if not student.is_dir():
        raise FileNotFoundError(f"{student}: there is no such folder; pass the folder of the trained student")
    if output.exists() and not (output / _PAGE).is_file() and (output.is_file() or any(output.iterdir())):
        raise FileExistsError(f"{output} holds something that `prepare` did not write; choose another folder")


def _write(new: Path, student: Path, meta: ModelMeta, told: dict[str, Any]) -> None:
    """Write entry, mock run, script and texts into the new folder, without paths of this machine."""
    (new / f"{told['module']}.py").write_text(model_code(meta), encoding="utf-8")
    if told["mock"] is not None:
        (new / _MOCK).write_text(told["mock"].to_markdown() + "\n", encoding="utf-8")
    rteb = next((row for row in told["coverage"] if row.private), None)
    told |= {"rteb": rteb, "has_card": (student / "README.md").is_file()}
    for name in (_PAGE, "evaluate.py", *_TEXTS[: 3 if rteb else 2]):
        (new / name).write_text(without_local_paths(_rendered(name, meta, **told), student), encoding="utf-8")


def _origin(meta: ModelMeta, record: TrainingRecord | None, collection: str) -> str:
    """Return in a sentence or two what the model is and where it comes from."""
    kind = f"{meta.name} is a {' and '.join(meta.model_type)} model"
    if record is None:
        return f"{kind}; it carries no record of its training."
    teacher = name_of(record.teacher) or "no teacher"
    version = record.versions.get("st-wkl", "")
    return f"{kind}: {record.student}, taught by {teacher} on {collection} with {record.loss} (st-wkl {version})."


def model_code(meta: ModelMeta) -> str:
    """Return the Python file that goes into `mteb/models/model_implementations/`; it defines one `ModelMeta`."""
    code = meta.to_python().replace("max_tokens=inf,", 'max_tokens=float("inf"),')  # which is no Python as MTEB has it
    return _rendered("model.py", meta, code=code)


def _rendered(name: str, meta: ModelMeta, **values: Any) -> str:
    variable = re.sub(r"\W+", "_", str(meta.name).split("/")[-1]).strip("_").lower()
    variable = f"model_{variable}" if variable[:1].isdigit() else variable
    return TEMPLATES.get_template(f"{name.lower()}.jinja").render(meta=meta, variable=variable, **values)


def _card_license(student: Path) -> str:
    """Return the licence that the student's card names."""
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


def _newest_commit(repo_id: str) -> tuple[str, bool]:
    """Ask the Hub for the commit whose results count, and whether everybody can load it."""
    try:
        found = HfApi().model_info(repo_id)
        return str(found.sha), not found.private
    except Exception as error:
        raise FileNotFoundError(
            f"the Hub does not tell the commit of {repo_id} ({type(error).__name__}). Push the student first, and "
            "publicly, as the leaderboard's reviewers load it; or pass its commit with revision= (--revision)"
        ) from error


def result_folders(sources: Iterable[str | Path]) -> list[Path]:
    """Return the folders with MTEB's files in and under `sources`.

    Raises:
        FileNotFoundError: If a source does not exist.
        ValueError: If a source holds no results of MTEB, or of ablations only.
    """
    folders: list[Path] = []
    for source in map(Path, sources):
        if not source.exists():
            raise FileNotFoundError(f"{source}: there is no such folder")
        found = sorted({path.parent for path in source.rglob(_META) if "experiments" not in path.parts})
        if not found:
            raise ValueError(
                f"{source} holds no results of MTEB (no {_META} beside task files). The leaderboard takes MTEB's "
                "own files only: run evaluate.py of the prepared folder and pass the cache that it writes"
            )
        folders += found
    return folders


def collect(sources: Iterable[str | Path], meta: ModelMeta, weights: str, target: Path) -> Path:
    """Bring one model's results into the repository's layout, and check them by its rules.

    Args:
        sources: Folders with MTEB's result files.
        meta: The student's entry.
        weights: `st_wkl.models.model_revision` of the student, by which `st_wkl.evaluate` knows it; results under it
            were computed on the same weights, from the local folder.
        target: Folder that gets `results/`.

    Returns:
        `target/results/{org}__{model}/{revision}`.

    Raises:
        ValueError: If a file is damaged, a task occurs twice with different results, results are of several models or
            another one, or the repository would refuse them; the message lists everything that is wrong.
    """
    folders = result_folders(sources)
    owners = {(about["name"], about["revision"]): folder for folder in folders if (about := _about(folder))}
    if len(owners) > 1:
        told = "; ".join(f"{name} at {revision[:12]} in {folder}" for (name, revision), folder in owners.items())
        raise ValueError(f"these are results of {len(owners)} models, not one: {told}. Pass one model's folder")
    for (name, revision), folder in owners.items():
        if (name, revision) != (meta.name, meta.revision) and revision != weights:
            raise ValueError(
                f"{folder} holds results of {name} at {revision}, not of {meta.name} at {meta.revision}, nor of the "
                f"weights in the student's folder ({weights}); evaluate this student again"
            )
    place = mteb.ResultCache(target).get_task_result_path("any", meta).parent
    place.mkdir(parents=True)
    settings: dict[str, None] = {}
    for folder in folders:
        for file in _task_files(folder):
            if (place / file.name).exists() and (place / file.name).read_bytes() != file.read_bytes():
                raise ValueError(f"{file} contradicts another result of the same task and model; pass one of the two")
            shutil.copyfile(file, place / file.name)
        if (folder / _SETTINGS).is_file():
            settings |= dict.fromkeys((folder / _SETTINGS).read_text(encoding="utf-8").splitlines())
    (place / _META).write_text(json.dumps(meta.to_dict(), default=str, indent=4), encoding="utf-8")
    if settings:
        (place / _SETTINGS).write_text("\n".join(settings) + "\n", encoding="utf-8")
    if problems := check_results(place):
        listed = "\n".join(f"- {problem}" for problem in problems)
        raise ValueError(f"MTEB's results repository would refuse these results:\n{listed}")
    return place


def check_results(folder: str | Path) -> list[str]:
    """Return what the results repository would refuse in `results/{org}__{model}/{revision}`; empty if nothing.

    Args:
        folder: The revision folder.

    Example:
        >>> check_results("submission/results/lab__student/" + commit)  # doctest: +SKIP
        []
    """
    folder = Path(folder)
    about, settings, files = _about(folder), _settings(folder / _SETTINGS), _task_files(folder)
    problems = [] if files else ["there is no task file"]
    if about["name"].replace("/", "__").replace(" ", "_") != folder.parent.name:
        problems.append(f"{_META} names {about['name']}, the folder {folder.parent.name}")
    if about["revision"] != folder.name:
        problems.append(f"{_META} says revision {about['revision']}, the folder {folder.name}")
    if folder.name in ("no_revision_available", "external"):
        problems.append(f"{folder.name} is no revision; evaluate a commit of the Hub")
    for file in files:
        problems += [f"{file.name}{problem}" for problem in _task_problems(file, settings)]
    return problems


def _task_problems(file: Path, settings: dict[tuple[str, str, str], str]) -> Iterator[str]:
    """Yield what would be refused of one task's file."""
    try:
        result = TaskResult.from_disk(file)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{file} is damaged or truncated ({error}); delete it and evaluate this task again") from error
    name = result.task_name
    if name != file.stem:
        yield f" is of task {name}; the file must be called {name}.json"
    if file.stat().st_size > _LARGEST:
        yield " is larger than 10 MB"
    try:
        task = mteb.get_task(name).metadata
    except KeyError:
        yield f": MTEB has no task {name}; results of your own collections stay in the card"
        return
    if result.dataset_revision != task.revision:
        given = result.dataset_revision
        yield f": computed on dataset revision {given}, MTEB's is {task.revision}; evaluate with the task as it is"
    if missing := ", ".join(split for split in task.eval_splits if split not in result.scores):
        yield f": split {missing} is missing"
    for split, entries in result.scores.items():
        for entry in entries:
            subset, score = entry["hf_subset"], entry["main_score"]
            if not isinstance(score, int | float) or not math.isfinite(score):
                yield f": main_score of {split}, {subset} is {score}"
            version = settings.get((name, split, subset))
            if version is None:
                yield f": {_SETTINGS} does not say how {split}, {subset} was run; evaluate it again"
            elif Version(version) < _OLDEST:
                yield f": {split}, {subset} was run with mteb {version}; {_OLDEST} or newer is needed"


def _task_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.json") if path.name != _META)


def _about(folder: Path) -> dict[str, str]:
    """Return the name and the revision of the model whose results are in a folder."""
    try:
        found = json.loads((folder / _META).read_text(encoding="utf-8"))
        return {key: str(found.get(key)) for key in ("name", "revision")}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{folder / _META} is damaged ({error}); delete the folder and evaluate again") from error


def _settings(file: Path) -> dict[tuple[str, str, str], str]:
    """Return (task, split, subset) to the version of mteb that ran it."""
    covered: dict[tuple[str, str, str], str] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines() if file.is_file() else [], 1):
        try:
            run = json.loads(line)
            for split in run["splits"]:
                covered |= {(run["task"], split, subset): str(run["version"]["mteb"]) for subset in run["subsets"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}:{number} is damaged ({error}); evaluate again with an empty cache") from error
    return covered
