"""Where the package keeps its files, and how it writes them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    """Return the user's cache folder of this package, `$XDG_CACHE_HOME/st_wkl` or `~/.cache/st_wkl`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "st_wkl"


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its place when the block ends without an error.

    A reader sees the old file or the new one, never half of it, and a full disk leaves the old one as it was.
    """
    path = Path(path)
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


def write_text(path: str | Path, text: str) -> Path:
    """Write `text` to `path` in one step."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


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
