"""The newcomer's script of the README, run as it stands there."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from st_wkl.data.collection import Collection
from st_wkl.models import load_model
from tests.helpers.animals import small_collection, write_beir
from tests.helpers.command import st_wkl

ROOT = Path(__file__).resolve().parents[1]
FIRST_LINE = "from st_wkl import Collection, DistillationDatasetBuilder, compare, distill, evaluate"


def test_the_newcomers_script_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first thing that is copied has to work, with nothing but a folder of that name beside it."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
    scripts = [block for block in blocks if block.startswith(FIRST_LINE)]
    assert len(scripts) == 1, f"README.md needs one python block that begins with {FIRST_LINE!r}"
    lines = [line for line in scripts[0].splitlines() if line.strip()]
    assert len(lines) <= 12
    folder = re.search(r'Collection\.load\("([^"]+)"\)', scripts[0])
    assert folder is not None
    write_beir(small_collection(), tmp_path / folder[1])
    monkeypatch.chdir(tmp_path)
    exec(compile(scripts[0], "README.md", "exec"), {})
    assert re.search(r"[+-]0\.\d+", capsys.readouterr().out), "it ends with the difference that training made"
    assert (tmp_path / "my-student" / "README.md").is_file()


def test_own_tables_are_read_by_the_command_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has no BEIR folder copies this line."""
    (line,) = re.findall(r"^st-wkl (import .+)$", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.M)
    monkeypatch.chdir(tmp_path)
    rows = "".join(f"{n},what is {n},It is {n}.\n" for n in range(10))
    Path("faq.csv").write_text(f"nr,asked,answer\n{rows}", encoding="utf-8")
    code, _, err = st_wkl(*line.split())
    assert code == 0, err
    assert {split: len(judged) for split, judged in Collection.load("my-collection").qrels.items()} == {
        "test": 2,
        "train": 8,
    }


def test_own_data_teacher_and_prompts_run_as_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has a collection of their own starts here: files by these lines, and this script over them."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for path, line in re.findall(r"^(my-collection/\S+) +(.+)$", text, flags=re.M):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"{line}\n", encoding="utf-8")
    collection = Collection.load("my-collection")
    assert (collection.documents, list(collection.qrels)) == ({"d1": "Cats Cats purr."}, ["test", "train"])
    shutil.rmtree("my-collection")
    write_beir(small_collection(), tmp_path / "my-collection")
    (script,) = re.findall(
        r"```python\n(from st_wkl import DistillationDatasetBuilder, distill\n.*?)```", text, flags=re.S
    )
    exec(compile(script, "README.md", "exec"), {})
    assert load_model("my-prompted-student")[0].prompts["query"] == "query: "
