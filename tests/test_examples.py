"""The scripts of the methods: short enough to be read, whole, and honest about what they gave."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("examples")]

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
METHODS = sorted(
    path.stem for path in EXAMPLES.glob("*.py") if "Seen on " in path.read_text(encoding="utf-8").split('"""')[1]
)


def test_there_is_a_script_for_each_method() -> None:
    """A script that lost its line of results would drop out of the checks below."""
    assert {"pair_distill", "adaptive_relevance_margin"} <= set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_scripts_are_short_and_import_what_exists(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 40 lines, and every name that is imported is there: a renamed class breaks a script unseen."""
    monkeypatch.syspath_prepend(EXAMPLES)  # as for a script that is run, beside which `common` is found
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"
