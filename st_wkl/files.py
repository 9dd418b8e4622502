"""Where the package keeps its files, and how it writes them."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import lock_descriptor

_PART = ".part"
_WINDOWS = os.name == "nt"
# A full disk, a quota, a place that may not be written to.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
# Outputs that are worked on, by thread: a command owns what the functions that it calls own again.
_OWNED: set[tuple[int, Path]] = set()


def cache_folder() -> Path:
    """Return the user's cache folder of this package, `$XDG_CACHE_HOME/st_wkl` or `~/.cache/st_wkl`.

    Raises:
        FileNotFoundError: There is no home directory, as for a user of a container, and the variable is not set.
    """
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(expanded(given)) / "st_wkl"
    try:
        return Path.home() / ".cache" / "st_wkl"
    except RuntimeError as error:
        raise FileNotFoundError(
            "This user has no home directory, so there is no place for scores and models. Set XDG_CACHE_HOME to a "
            "folder that may be written to."
        ) from error


def expanded(source: str | os.PathLike[str]) -> str:
    """Return the name of a file, a folder or a Hub id, with the user's home folder for a `~` at its beginning.

    A shell leaves it in `--output=~/here`, and a YAML file has no shell; nobody means a folder that is called `~`.
    """
    return os.path.expanduser(os.fspath(source))  # noqa: PTH111 - a Path would take the dot from "./here"


def file_name(name: str, longest: int = 200) -> str:
    """Return a name that people gave (of a collection, a task, a model) as the name of one file.

    A plain name stays. One that would be a path, a hidden file or too long for a disk, on which 255 bytes have to hold
    an ending, too, is changed and gets a hash, so that two names never share a file.
    """
    plain = name.encode(errors="replace")
    if 0 < len(plain) <= longest and not name.startswith(".") and not {"/", "\0"} & set(name):
        return name
    kept = re.sub(rb"[^A-Za-z0-9_.-]+", b"_", plain).lstrip(b"._")[: longest - 13].decode()
    return f"{kept}-{content_hash(name, size=6)}"


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name in errors of the disk the file or folder that a person knows, and not the hidden one beside it."""
    try:
        yield
    except OSError as error:
        ours = error.filename is None or _prefix(path) in str(error.filename)
        if error.errno not in _DISK or not ours:
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from error


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its place when the block ends without an error.

    A reader sees the old file or the new one, never half of it, whether the process is killed, the disk is full or the
    power fails. What a killed process left of the same file is removed.
    """
    path = Path(expanded(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    with _naming(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=_prefix(path), suffix=_PART)
        temporary, held = Path(name), os.fdopen(handle)
        try:
            if not _WINDOWS:  # where nothing that is open can be removed, and nobody else writes to what is locked
                lock_descriptor(handle)  # tells that somebody is at work on it, however that one ends
            yield temporary
            # mkstemp makes files that only the owner may read; results and cards are meant to be shared.
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            sync(temporary)
            if _WINDOWS:
                held.close()
            os.replace(temporary, path)
            sync(path.parent)
        finally:
            held.close()
            temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: str | Path) -> Iterator[Path]:
    """Yield a new folder that takes the place of `folder` when the block ends without an error; as `replacing` does."""
    folder = Path(expanded(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder)
    with _naming(folder):
        workspace = Path(tempfile.mkdtemp(dir=folder.parent, prefix=_prefix(folder), suffix=_PART))
        handle = os.open(workspace / "lock", os.O_RDWR | os.O_CREAT)
        try:
            lock_descriptor(handle)
            (new := workspace / "new").mkdir()
            yield new
            sync_tree(new)
            if folder.exists():
                os.replace(folder, workspace / "old")
            os.replace(new, folder)
            sync(folder.parent)
        finally:
            os.close(handle)
            shutil.rmtree(workspace, ignore_errors=True)


def _remove_abandoned(path: Path) -> None:
    """Remove what killed processes left beside a file or folder that they were writing."""
    for left in path.parent.glob(f"{glob.escape(_prefix(path))}*{_PART}"):
        with suppress(OSError):
            folder = left.is_dir()
            handle = os.open(left / "lock" if folder else left, os.O_RDWR | (os.O_CREAT if folder else 0))
            try:
                free = lock_descriptor(handle, blocking=False)
            finally:
                os.close(handle)
            if free:
                shutil.rmtree(left) if folder else left.unlink()


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if _WINDOWS and path.is_dir():  # has no handles of folders
        return
    handle = os.open(path, os.O_RDWR if _WINDOWS else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Wait until a folder is on the disk with all that is in it."""
    for path in (folder, *folder.rglob("*")):
        sync(path)


def is_part(path: Path) -> bool:
    """Tell whether a file or folder is what a killed process had not finished."""
    return (path.name.startswith(".") and path.name.endswith(_PART)) or path.name == ".lock"  # of earlier versions


def holds_nothing(folder: Path) -> bool:
    """Tell whether a folder holds nothing but what a killed process left of a file, or is not there."""
    return not folder.exists() or (folder.is_dir() and all(is_part(path) for path in folder.iterdir()))


@contextmanager
def owned(output: str | Path) -> Iterator[None]:
    """Make sure that this process is the only one at work on an output, be it a file or a folder.

    Raises:
        FileExistsError: If another one is, with its process id.
    """
    output = Path(expanded(output)).absolute()
    if (key := (threading.get_ident(), output)) in _OWNED:
        yield
        return
    with parents_of(output):
        handle, path = _lock(output)
        _OWNED.add(key)
        try:
            if path is not None:
                os.truncate(handle, 0)
                os.write(handle, str(os.getpid()).encode())
            _remove_abandoned(output)  # a complete output is not written again
            yield
        finally:
            _OWNED.discard(key)
            if path is not None and not _WINDOWS:
                path.unlink(missing_ok=True)  # while it is locked: the next one to open it may have it at once
            os.close(handle)
            if path is not None and _WINDOWS:  # where nothing that is open can be removed
                with suppress(OSError):
                    path.unlink()


@contextmanager
def parents_of(path: Path) -> Iterator[None]:
    """Make the folders that a file or folder will lie in, and remove them if nothing came to lie in them."""
    path = Path(expanded(path)).absolute()
    missing = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for folder in missing:
            with suppress(OSError):  # holds what was made meanwhile
                folder.rmdir()


def _prefix(path: Path) -> str:
    """Return how the names of hidden files beside a file or folder begin, for which its own may leave no room."""
    return f".{path.name if len(os.fsencode(path.name)) <= 200 else content_hash(path.name)}."


def _lock(output: Path) -> tuple[int, Path | None]:
    """Return a locked handle and the file beside the output that it is of.

    A folder beside which this user may not write, such as the mounted one of a container, is locked itself.
    """
    path = output.parent / f"{_prefix(output)}lock"
    while True:
        try:
            handle, beside = os.open(path, os.O_RDWR | os.O_CREAT, 0o666), True
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or not output.exists():
                raise
            handle, beside = os.open(output, os.O_RDONLY), False
        if not lock_descriptor(handle, blocking=False):  # given back by the system however the process ends
            who = ""
            with suppress(OSError):  # a folder, or a file that cannot be read as long as it is locked
                who = os.read(handle, 100).decode(errors="replace").strip()
            os.close(handle)
            raise FileExistsError(
                f"Another process is at work in {output}{f' (process {who})' if who else ''}. Wait for it, or stop it."
            )
        if not beside:
            return handle, None
        if path.exists() and os.fstat(handle).st_ino == path.stat().st_ino:
            return handle, path
        os.close(handle)  # of one that has just ended and removed it


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write `text` to `path` in one step."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(expanded(path))


def read_json(path: str | os.PathLike[str]) -> Any:
    """Return what a JSON file holds.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it holds no JSON; the message names the file.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} holds no JSON: {error}") from error


def read_object(path: Path) -> dict[str, Any] | None:
    """Return the object that a JSON file holds, None where it is missing, damaged, or holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def set_aside(path: str | Path) -> Path:
    """Rename a damaged file to `<name>.damaged-<n>`, which no reader takes for a file of ours, and return its new path.

    It is not deleted: parts of it may be worth something to somebody.
    """
    path = Path(path)
    number = 1
    while (kept := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    os.replace(path, kept)
    return kept


def content_hash(value: Any, *, size: int = 20) -> str:
    """Return a hash of a JSON value, whatever the order of its keys.

    Args:
        value: What `json.dumps` takes.
        size: Bytes; two hexadecimal digits each.

    Example:
        >>> content_hash({"a": 1, "b": 2}, size=4) == content_hash({"b": 2, "a": 1}, size=4)
        True
    """
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=size).hexdigest()
