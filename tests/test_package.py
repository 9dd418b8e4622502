"""What a user meets before any model: names, start-up time's cause, versions, and the README."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import st_wkl

ROOT = Path(__file__).resolve().parents[1]


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_light() -> None:
    """Importing torch takes seconds; a tool that pays them for `--help` feels broken."""
    heavy = "torch|transformers|datasets|sentence_transformers|mteb|numba|peft|onnxruntime|httpx|tenacity"
    assert python(f"import sys, st_wkl; print([m for m in sys.modules if m in '{heavy}'.split('|')])") == "[]"
    assert python(f"import sys, st_wkl.cli; print([m for m in sys.modules if m in '{heavy}'.split('|')])") == "[]"


def test_every_public_name_can_be_imported() -> None:
    """Lazy names fail at first use, which for a typo in the table would be at a user's."""
    for name in st_wkl.__all__:
        assert getattr(st_wkl, name).__name__ == name
        assert name in dir(st_wkl)
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        st_wkl.Nonsense  # noqa: B018


def test_package_is_typed_and_versioned() -> None:
    """Type checkers ignore a package without the marker, and the citation file has to name the released version."""
    assert (ROOT / "st_wkl" / "py.typed").is_file()
    assert f"version: {st_wkl.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_private_names_of_others_stay_in_one_file() -> None:
    """Names with an underscore change without notice; when they do, one file has to be mended."""
    pattern = re.compile(
        r"^\s*from (?:sentence_transformers|transformers|mteb|datasets|peft)\S* import .*\b_[a-z]\w+", re.M
    )
    users = {path.name for path in (ROOT / "st_wkl").rglob("*.py") if pattern.search(path.read_text(encoding="utf-8"))}
    assert users <= {"_compat.py"}
