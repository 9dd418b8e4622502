"""Where the package keeps its files, and how it writes them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    """Return the user's cache folder of this package, `$XDG_CACHE_HOME/st_wkl` or `~/.cache/st_wkl`.

    Raises:
        FileNotFoundError: There is no home directory, as for a user of a container, and the variable is not set.
    """
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given).expanduser() / "st_wkl"
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


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its place when the block ends without an error.

    A reader sees the old file or the new one, never half of it, and a full disk leaves the old one as it was.
    """
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files that only the owner may read; results and cards are meant to be shared.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write `text` to `path` in one step."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path).expanduser()


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
