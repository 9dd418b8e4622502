"""The messages of the package, as its code has them: what is between the words of an f-string becomes `…`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "st_wkl"
# Calls whose first text is a message; so is what is raised.
SAYS = {"warn", "warning"}
# What Python's own protocols ask for, and no user meets.
INSIDE = {"AttributeError", "NotImplementedError", "SystemExit"}


def words(node: ast.AST | None) -> str:
    """Return the text of a constant or an f-string; the sum of two; "" of anything else."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (words(node.left) or "…") + (words(node.right) or "…")
    return ""


def messages() -> Iterator[tuple[str, str, str]]:
    """Yield the room, the kind and the words of each message, in the order of the code."""
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE)
        room = place.parts[0] if len(place.parts) > 1 else "files and models"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            call = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(call, ast.Call):
                continue
            name = ast.unparse(call.func).rpartition(".")[2]
            texts = [text for text in map(words, call.args) if len(text.replace("…", "")) > 10]
            if texts and name not in INSIDE and (isinstance(node, ast.Raise) or name in SAYS):
                kind = "warning" if name in SAYS else name if name[0].isupper() else "error"
                yield room, kind, " ".join(texts[-1].split())


def everything() -> set[str]:
    """Return every text in the code that could be part of a message."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        found |= {" ".join(words(node).split()) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))}
    return found - {""}
