"""The one results object: what the terminal prints, the file keeps, the comparison reads and the card shows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from platform import python_version
from typing import Any

from st_wkl._versions import installed_versions
from st_wkl.evaluation.scores import TaskScores
from st_wkl.files import write_text

# 2 added groups, training queries, more metrics per query and the checksum; files of version 1 are read as they are.
SCHEMA_VERSION = 2
FILE_NAME = "results.json"


@dataclass
class Results:
    """Everything that one evaluation of one model says; saved as strict JSON.

    Args:
        model: `name`, `revision` (a hash of weights and settings) and `class` of the model, and what else describes it.
        tasks: One entry per task, split and subset.
        versions: Package name to version, of those that decide a score.
        created: When, ISO 8601 in UTC.

    Example:
        >>> results = Results.load("student/results.json")  # doctest: +SKIP
        >>> results.ndcg_at_10, results.task("scifact").metrics["recall_at_100"]  # doctest: +SKIP
    """

    model: dict[str, Any]
    tasks: list[TaskScores]
    versions: dict[str, str] = field(default_factory=lambda: package_versions())
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def name(self) -> str:
        """Name of the model."""
        return str(self.model["name"])

    @property
    def ndcg_at_10(self) -> float:
        """nDCG@10 of the only task; with several tasks use `results.task(name).ndcg_at_10`."""
        return self.task().ndcg_at_10

    def task(self, name: str | None = None, *, split: str | None = None, subset: str | None = None) -> TaskScores:
        """Return the scores of one task.

        Args:
            name: Task name; None for the only one.
            split: Needed where the task was evaluated on several splits.
            subset: Needed where the task has several subsets.

        Raises:
            ValueError: If no task or more than one fits; the message lists what there is.
        """
        wanted = {"task": name, "split": split, "subset": subset}
        found = [t for t in self.tasks if all(v is None or getattr(t, k) == v for k, v in wanted.items())]
        if len(found) == 1:
            return found[0]
        what = ", ".join(f"{k} {v!r}" for k, v in wanted.items() if v is not None) or "one task"
        have = ", ".join(f"{t.task} ({t.split}, {t.subset})" for t in self.tasks) or "nothing"
        raise ValueError(f"results of {self.name}: {len(found)} entries fit {what}, not one; there is {have}")

    def table(self) -> str:
        """Return the scores as a markdown table, one row per task."""
        from st_wkl.evaluation.tables import results_table

        return results_table({self.name: self})

    def save(self, path: str | Path) -> Path:
        """Write the results in one step and return the file.

        Args:
            path: A `.json` file, or a folder that gets `results.json`.
        """
        content = asdict(self)
        payload = {
            "format": "st-wkl results",
            "schema_version": SCHEMA_VERSION,
            "checksum": _checksum(content),
            **content,
        }
        text = json.dumps(payload, indent=2, ensure_ascii=False, allow_nan=False)
        return write_text(results_file(path), text + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Read results that `save` wrote.

        Args:
            path: The file, or the folder that holds `results.json`.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is truncated, is no results file, was written by a newer st_wkl, or contradicts
                itself; the message says what to do.
        """
        file = results_file(path)
        if not file.is_file():
            what = "a file of another kind" if Path(path).is_file() else f"a folder without {FILE_NAME}"
            raise FileNotFoundError(
                f"{path} is {what if Path(path).exists() else 'not there'}; results are a .json file, or a folder with "
                f"{FILE_NAME}. `st-wkl evaluate MODEL TASK --output FILE.json` writes them."
            )
        try:
            payload = json.loads(file.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        except (json.JSONDecodeError, UnicodeDecodeError, _NotStrictJSON) as error:
            raise ValueError(
                f"{file} is damaged or incomplete ({error}); delete it and run the evaluation again"
            ) from error
        if not isinstance(payload, dict) or "schema_version" not in payload:
            raise ValueError(f"{file} is not a results file of st_wkl: it has no schema_version; check the path")
        schema = payload["schema_version"]
        if not isinstance(schema, int) or schema > SCHEMA_VERSION:
            raise ValueError(
                f"{file} has schema_version {schema!r}, this st_wkl reads up to {SCHEMA_VERSION}; "
                "upgrade with `pip install -U st-wkl`"
            )
        try:
            loaded = _results_from(payload)
            if schema > 1 and payload["checksum"] != _checksum(payload):
                raise ValueError(
                    "its model and scores were not written together, as when the results of two students are mixed in "
                    "one file"
                )
            return loaded
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{file} cannot be used: {reason}; run the evaluation again") from error


def _checksum(content: Mapping[str, Any]) -> str:
    """Return a hash of a model and its scores, which belong together."""
    text = json.dumps([content["model"], content["tasks"]], sort_keys=True, allow_nan=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def results_file(path: str | Path) -> Path:
    """Return the file that `path` means: itself if it ends in .json, otherwise `results.json` inside it."""
    path = Path(path).expanduser()
    return path if path.suffix == ".json" else path / FILE_NAME


def check_replaceable(path: str | Path) -> None:
    """Raise FileExistsError, before any work, if results written to `path` would replace a file of somebody else."""
    file = results_file(path)
    if file.exists():
        try:
            Results.load(file)
        except ValueError as error:
            raise FileExistsError(f"{file} would be replaced: {error}, or choose another output") from error


def package_versions(packages: Iterable[str] = ()) -> dict[str, str]:
    """Return the versions of what decides a score."""
    names = packages or ("mteb", "sentence-transformers", "transformers", "torch", "numpy", "pytrec-eval-terrier")
    return {"python": python_version(), **installed_versions(("st-wkl", *names))}


class _NotStrictJSON(ValueError):
    """A number that strict JSON does not have."""


def _refuse_constant(constant: str) -> float:
    raise _NotStrictJSON(f"it holds {constant}, which is no JSON number")


def _results_from(payload: dict[str, Any]) -> Results:
    """Build results from parsed JSON; a KeyError, TypeError or ValueError says what does not fit."""
    model, versions = payload["model"], payload["versions"]
    if not isinstance(model, dict) or not isinstance(model["name"], str) or not isinstance(model["revision"], str):
        raise TypeError("`model` needs a name and a revision")
    if not isinstance(payload["tasks"], list) or not isinstance(versions, dict):
        raise TypeError("`tasks` must be a list and `versions` a mapping")
    tasks = [TaskScores(**task) for task in payload["tasks"]]
    return Results(model=model, tasks=tasks, versions=versions, created=str(payload["created"]))
