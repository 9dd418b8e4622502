"""What CONTRIBUTING shows is tried here: a newcomer's first loss and first teacher are copied from it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from st_wkl import DistillationDatasetBuilder, distill
from st_wkl.training import default_arguments
from tests.helpers.animals import small_collection
from tests.helpers.students import make_student

ROOT = Path(__file__).resolve().parents[1]


def test_the_loss_and_the_teacher_that_are_shown_work(tiny_bert_path: Path, tmp_path: Path) -> None:
    """An example that fails costs a newcomer the first evening."""
    shown: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL):
        assert len([line for line in code.splitlines() if line]) <= 10
        exec(code, shown)
    builder = DistillationDatasetBuilder(small_collection(), shown["Overlap"](), store=tmp_path / "scores.sqlite3")
    student: Any = make_student("dense", tiny_bert_path)
    args: Any = default_arguments(student, tmp_path / "out", max_steps=2, use_cpu=True)
    made = shown["ScoreMSEDistillLoss"](student)
    trained = distill(student, builder.build(show_progress=False), made, args, output_dir=tmp_path / "out")
    assert trained.record.loss == "ScoreMSEDistillLoss"
