"""MTEB's result files of one model, and the rules by which the results repository takes them.

Source: https://github.com/embeddings-benchmark/results, its README and the tests that run on its pull requests.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mteb.models import ModelMeta

META_FILE, SETTINGS_FILE = "model_meta.json", "run_settings.jsonl"
_LARGEST = 10 * 2**20
_NO_REVISIONS = {"no_revision_available", "external"}


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
        found = sorted({path.parent for path in source.rglob(META_FILE) if "experiments" not in path.parts})
        if not found:
            raise ValueError(
                f"{source} holds no results of MTEB (no {META_FILE} beside task files). The leaderboard takes MTEB's "
                "own files only: run evaluate.py of the prepared folder and pass the cache that it writes"
            )
        folders += found
    return folders


def collect(sources: Iterable[str | Path], meta: ModelMeta, weights: str, target: Path) -> Path:
    """Bring one model's results into the repository's layout, and check them by its rules.

    Args:
        sources: Folders with MTEB's result files.
        meta: The student's entry.
        weights: `st_wkl.models.model_revision` of the student.
        target: Folder that gets `results/`.

    Returns:
        `target/results/{org}__{model}/{revision}`.

    Raises:
        ValueError: If a file is damaged, results are another model's, or the repository would refuse them; the message
            lists everything that is wrong.
    """
    folders = result_folders(sources)
    check_owner(folders, meta, weights)
    place = lay_out(folders, meta, target)
    if problems := check_results(place):
        listed = "\n".join(f"- {problem}" for problem in problems)
        raise ValueError(f"MTEB's results repository would refuse these results:\n{listed}")
    return place


def check_owner(folders: Iterable[Path], meta: ModelMeta, weights: str) -> None:
    """Stop unless all results are the student's.

    Args:
        folders: What `result_folders` returned.
        meta: The student's entry.
        weights: The hash by which `st_wkl.evaluate` knows the student (`model_revision`); results under it were
            computed on the same weights, from the local folder.

    Raises:
        ValueError: If the folders hold results of several models, or of another one.
    """
    owners: dict[tuple[str, str], Path] = {}
    for folder in folders:
        about = _read(folder / META_FILE)
        owners.setdefault((str(about.get("name")), str(about.get("revision"))), folder)
    if len(owners) > 1:
        told = "; ".join(f"{name} at {revision[:12]} in {folder}" for (name, revision), folder in owners.items())
        raise ValueError(f"these are results of {len(owners)} models, not one: {told}. Pass one model's folder")
    for (name, revision), folder in owners.items():
        if (name, revision) != (meta.name, meta.revision) and revision != weights:
            raise ValueError(
                f"{folder} holds results of {name} at {revision}, not of {meta.name} at {meta.revision}, nor of the "
                f"weights in the student's folder ({weights}); evaluate this student again"
            )


def check_results(folder: str | Path) -> list[str]:
    """Return what the results repository would refuse in `results/{org}__{model}/{revision}`; empty if nothing.

    Args:
        folder: The revision folder.

    Example:
        >>> check_results("submission/results/lab__student/" + commit)  # doctest: +SKIP
        []
    """
    import mteb

    folder = Path(folder)
    about = _read(folder / META_FILE)
    problems = []
    if str(about.get("name")).replace("/", "__").replace(" ", "_") != folder.parent.name:
        problems.append(f"{META_FILE} names {about.get('name')}, the folder {folder.parent.name}")
    if about.get("revision") != folder.name:
        problems.append(f"{META_FILE} says revision {about.get('revision')}, the folder {folder.name}")
    if folder.name in _NO_REVISIONS:
        problems.append(f"{folder.name} is no revision; evaluate a commit of the Hub")
    settings = _settings(folder / SETTINGS_FILE)
    files = task_files(folder)
    if not files:
        problems.append("there is no task file")
    for file in files:
        result = _read(file)
        name = str(result.get("task_name"))
        if name != file.stem:
            problems.append(f"{file.name} is of task {name}; the file must be called {name}.json")
        if file.stat().st_size > _LARGEST:
            problems.append(f"{file.name} is larger than 10 MB")
        try:
            task = mteb.get_task(name)
        except KeyError:
            problems.append(f"{file.name}: MTEB has no task {name}; results of your own collections stay in the card")
            continue
        problems += [f"{file.name}: {problem}" for problem in _task_problems(task, result, settings.get(name, {}))]
    return problems


def task_files(folder: Path) -> list[Path]:
    """Return the task files in a revision folder."""
    return sorted(path for path in folder.glob("*.json") if path.name != META_FILE)


def lay_out(folders: Iterable[Path], meta: ModelMeta, target: Path) -> Path:
    """Copy results into `target/results/{org}__{model}/{revision}`, under the student's name, and return that folder.

    Raises:
        ValueError: If a task occurs twice with different results.
    """
    place = target / "results" / str(meta.name).replace("/", "__") / str(meta.revision)
    place.mkdir(parents=True)
    settings: list[str] = []
    for folder in folders:
        for file in task_files(folder):
            if (place / file.name).exists() and (place / file.name).read_bytes() != file.read_bytes():
                raise ValueError(f"{file} contradicts another result of the same task and model; pass one of the two")
            shutil.copyfile(file, place / file.name)
        if (folder / SETTINGS_FILE).is_file():
            settings += (folder / SETTINGS_FILE).read_text(encoding="utf-8").splitlines()
    (place / META_FILE).write_text(json.dumps(meta.to_dict(), default=str, indent=4), encoding="utf-8")
    if settings:
        (place / SETTINGS_FILE).write_text("\n".join(dict.fromkeys(settings)) + "\n", encoding="utf-8")
    return place


def _task_problems(task: Any, result: dict[str, Any], covered: dict[tuple[str, str], str]) -> list[str]:
    problems = []
    wanted, given = task.metadata.revision, result.get("dataset_revision")
    if given != wanted:
        problems.append(f"computed on dataset revision {given}, MTEB's is {wanted}; evaluate with the task as it is")
    if missing := [split for split in task.metadata.eval_splits if split not in result["scores"]]:
        problems.append(f"split {', '.join(missing)} is missing")
    for split, entries in result["scores"].items():
        for entry in entries:
            subset, score = entry.get("hf_subset"), entry.get("main_score")
            if not isinstance(score, int | float) or not math.isfinite(score):
                problems.append(f"main_score of {split}, {subset} is {score}")
            version = covered.get((split, subset))
            if version is None:
                problems.append(f"{SETTINGS_FILE} does not say how {split}, {subset} was run; evaluate it again")
            elif int(version.split(".")[0]) < 2:
                problems.append(f"{split}, {subset} was run with mteb {version}; 2.0 or newer is needed")
    return problems


def _settings(file: Path) -> dict[str, dict[tuple[str, str], str]]:
    """Return task to (split, subset) to the version of mteb that ran it."""
    covered: dict[str, dict[tuple[str, str], str]] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines() if file.is_file() else [], 1):
        try:
            run = json.loads(line)
            for split in run["splits"]:
                for subset in run["subsets"]:
                    covered.setdefault(run["task"], {})[split, subset] = str(run["version"]["mteb"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}:{number} is damaged ({error}); evaluate again with an empty cache") from error
    return covered


def _read(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged or truncated ({error}); delete it and evaluate this task again") from error
    if not isinstance(value, dict) or (file.name != META_FILE and not isinstance(value.get("scores"), dict)):
        raise ValueError(f"{file} is no result file of MTEB; take it out of the folder")
    return value
