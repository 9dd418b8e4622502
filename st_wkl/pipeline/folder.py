"""The folder of a run: whose it is, what in it is complete, and hashes of what stages read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from st_wkl.files import holds_nothing, is_part, owned, write_text

RUN_FILE, CONFIG_FILE = "run.json", "config.yaml"


@contextmanager
def claimed(output: Path, who: Mapping[str, str]) -> Iterator[None]:
    """Make sure that a folder is this run's, and this process the only one in it.

    Args:
        output: The folder; made if there is none.
        who: What makes it this run's, whatever else is tried in it.

    Raises:
        FileExistsError: If it holds something else or another run, or is in use.
    """
    path = output / RUN_FILE
    with owned(output):
        found = read_json(path)
        if not found and not holds_nothing(output):
            raise FileExistsError(f"{output} holds something that is no run of st-wkl. Set another output.")
        if found and (other := {key: found.get(key) for key in who if found.get(key) != who[key]}):
            told = ", ".join(f"{key} {value!r}" for key, value in other.items())
            raise FileExistsError(
                f"{output} holds another run, with {told}. Set another output, or delete that one if it may go."
            )
        (output / ".lock").unlink(missing_ok=True)  # where earlier versions had it
        if not found:
            write_text(path, json.dumps({"st-wkl": 1, **who}, indent=2) + "\n")
        for left in output.glob(".dataset.*"):  # of a process of an earlier version that was killed while it wrote
            shutil.rmtree(left, ignore_errors=True)
        try:
            yield
        except BaseException:
            if not found and {file.name for file in output.iterdir()} <= {RUN_FILE}:  # it has done nothing
                shutil.rmtree(output)
            raise


def read_json(path: Path) -> dict[str, Any]:
    """Return an object that a JSON file holds, an empty one if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def set_aside(made: Path, output: Path) -> Path | None:
    """Move what a stage had made to `replaced/`, and return where it is now."""
    if not made.exists():
        return None
    number = 1
    while (kept := output / "replaced" / f"{number}-{made.name}").exists():
        number += 1
    kept.parent.mkdir(parents=True, exist_ok=True)
    os.replace(made, kept)
    return kept


def source_digest(source: str) -> str:
    """Return the hash of a file or folder, or the name of what is elsewhere."""
    path = Path(source).expanduser()
    return digest(path) if path.exists() else source


def digest(path: Path, *, without: set[str] | frozenset[str] = frozenset()) -> str:
    """Return a hash of a file, or of the names and contents of a folder, less what a killed process left in it.

    Args:
        path: The file or folder.
        without: Names of files that do not count.
    """
    found = hashlib.blake2b(digest_size=16)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        name = file.relative_to(path).as_posix()
        if file.name in without or file.name == CONFIG_FILE or is_part(file):
            continue
        found.update(f"{name}\n".encode())
        with file.open("rb") as opened:
            found.update(hashlib.file_digest(opened, "blake2b").digest())
    return found.hexdigest()
