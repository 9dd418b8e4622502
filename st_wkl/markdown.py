"""Text for cards and tables: names that stay names, settings on one line, and no path of this machine."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Folders that only mean something on one machine; those of this one are added when a card is written.
_LOCAL_ROOTS = ("/home", "/Users", "/root", "/tmp", "/mnt", "/media", "/scratch", "/private", "/var/folders")
_SYSTEM_ROOTS = {"/", "/usr", "/etc", "/bin", "/dev", "/opt", "/lib"}


def markdown_table(lines: Iterable[Iterable[str]]) -> str:
    """Return rows of cells, the header and its rule among them, as a markdown table without a last newline."""
    return "\n".join("| " + " | ".join(markdown_cell(cell) for cell in line) + " |" for line in lines)


def markdown_cell(text: str) -> str:
    """Return `text` so that it stays inside one cell of a markdown table."""
    return re.sub(r"(?<!\\)\|", r"\\|", " ".join(text.split()))


def markdown_text(text: str) -> str:
    """Return `text`, such as a name from a file, as one line that is no HTML, whatever it holds."""
    return re.sub(r"(?<!\\)<", r"\\<", " ".join(text.split()))


def markdown_code(text: object) -> str:
    """Return a name or value as code on one line, whatever it holds."""
    line = " ".join(str(text).splitlines())  # spaces stay: a prompt often ends with one
    fence = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    space = " " if line[:1] == "`" or line[-1:] == "`" else ""
    return f"{fence}{space}{line}{space}{fence}"


def markdown_block(language: str, text: str) -> str:
    """Return lines of code as a block that they cannot end."""
    fence = "`" * max(3, max(map(len, re.findall("`+", text)), default=0) + 1)
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def listed(name: str | None, settings: Mapping[str, Any]) -> str:
    """Return `name` and the settings as one line of text."""
    items = [f"{key} {markdown_code(value)}" for key, value in _flat(settings) if value != name]
    return ": ".join(part for part in (linked(name) if name else "", ", ".join(items)) if part)


def linked(name: str, kind: str = "") -> str:
    """Return a name as code, linked where it is an id on the Hub; `kind` is `"datasets/"` for a dataset."""
    return f"[`{name}`](https://huggingface.co/{kind}{name})" if is_hub_id(name) else markdown_code(name)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield every number, word and short list of nested settings with the path to it."""
    for key, value in settings.items():
        label = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{label}.")
        elif isinstance(value, float):
            yield label, f"{value:.6g}"
        elif isinstance(value, list | tuple):
            if value and len(value) <= 8 and all(isinstance(item, str | int | float) for item in value):
                yield label, ", ".join(map(str, value))
        elif value is not None and value != "":
            yield label, str(value)


def is_hub_id(value: Any) -> bool:
    """Say whether `value` is an id on the Hub and not a folder here."""
    if isinstance(value, list):
        return bool(value) and all(is_hub_id(item) for item in value)
    return isinstance(value, str) and bool(_HUB_ID.fullmatch(value)) and not Path(value).exists()


def without_local_paths(content: str, folder: Path) -> str:
    """Return the text with each path of this machine cut to its last part."""
    here = {f"/{place.parts[1]}" for place in (folder.resolve(), Path.cwd(), Path.home()) if len(place.parts) > 1}
    temporary = {tempfile.gettempdir()}
    roots = sorted({*_LOCAL_ROOTS, *here, *temporary} - _SYSTEM_ROOTS, key=len, reverse=True)
    any_root = "|".join(map(re.escape, roots))
    # A model that was loaded from a folder is linked as if the folder were a Hub id.
    content = re.sub(r"\[[^\]]*\]\(https://huggingface\.co//([^)]*)\)", lambda m: f"`{_last_part(m[1])}`", content)
    unix = rf"""(?<![\w/.:~-])(?:file://)?(?:{any_root})/[^\s"'`()<>\[\]|,;:]+"""
    windows = r"""(?<!\w)[A-Za-z]:\\[^\s"'`()<>\[\]|,;:]+"""
    return re.sub(f"{unix}|{windows}", lambda match: _last_part(match[0]), content)


def _last_part(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]
