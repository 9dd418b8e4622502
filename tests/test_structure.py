"""The house: a graph of imports without circles, small files and functions, laziness where it is worth it."""

from __future__ import annotations

import ast
import doctest
import importlib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "st_wkl"
FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}

# What may be imported inside a function, and why. Anything else stands at the top of its file.
LAZY = {
    "torch": "takes a second, and `st-wkl --help` and the search for candidates do without it",
    "sentence_transformers": "takes seconds",
    "transformers": "takes seconds",
    "datasets": "takes a second",
    "mteb": "takes seconds",
    "peft": "takes a second, and most students have no adapter",
    "huggingface_hub": "takes half a second, and folders do without it",
    "pyarrow": "takes a quarter of a second",
    "scipy": "takes a quarter of a second",
    "bm25s": "takes half a second",
    "Stemmer": "comes with bm25s",
    "jinja2": "only a report has a template of its own",
    "matplotlib": "an extra",
    "onnxruntime": "an extra",
    "ray": "an extra",
    "vllm": "is there on machines with GPUs alone",
    "st_wkl": "what takes as long as what it imports, or is needed by one command alone",
}


def imports(tree: ast.AST, inside: bool = False) -> Iterator[tuple[str, bool]]:
    """Yield what each import names, and whether it is inside a function; what only annotations need is left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield (name if (name := f"{node.module}.{alias.name}") in FILES else str(node.module)), inside
        else:
            yield from imports(node, inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_imports_have_no_circle() -> None:
    """Two rooms that need each other are one room, or answer one question twice; lazy imports only hide it."""
    graph = {name: {found for found, _ in imports(tree) if found in FILES} for name, tree in TREES.items()}
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError, with the circle


def test_files_and_functions_are_small() -> None:
    """What does not fit a screen or two is not read before it is changed."""
    assert {name: n for name, path in FILES.items() if (n := len(path.read_text("utf-8").splitlines())) > 450} == {}
    lengths = {
        f"{name}.{node.name}": _lines(node)
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }
    assert {name: lines for name, lines in lengths.items() if lines > 70} == {}


def _lines(function: ast.FunctionDef) -> int:
    """Return the lines of a function without its documentation."""
    documented = ast.get_docstring(function) is not None
    first = function.body[0]
    assert function.end_lineno is not None
    assert first.end_lineno is not None
    return function.end_lineno - function.lineno + 1 - (first.end_lineno - first.lineno + 1 if documented else 0)


def test_imports_inside_functions_have_a_reason() -> None:
    """They hide what a file needs; a few save seconds of every start."""
    lazy = [(name, found) for name, tree in TREES.items() for found, inside in imports(tree) if inside]
    wrong = [(name, found) for name, found in lazy if found.split(".")[0] not in LAZY]
    assert wrong == []
    assert len(lazy) <= 90


@pytest.mark.parametrize("module", FILES)
def test_examples_of_docstrings_run(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An example that does not run is worse than none: it is what is copied."""
    monkeypatch.chdir(tmp_path)
    if not module.endswith("__main__"):
        assert doctest.testmod(importlib.import_module(module)).failed == 0
