"""A pool of processes that cannot start must say why, before a pair is scored."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = """
import numpy as np
from st_wkl.data.engines import score_chunks
class Teacher:
    def score(self, pairs):
        return np.zeros(len(pairs), dtype=np.float32)
def main():
    print(len(list(score_chunks(Teacher(), [[("a", "b")]], engine="pool", workers=1))))
"""


@pytest.mark.parametrize(
    ("way", "end", "message"),
    [
        ("file", "main()", "script.py would start pools without end"),
        ("stdin", "main()", "there is none: this program came from <stdin>"),
        ("-c", "main()", "cannot see Teacher, which was defined at a prompt"),
        ("file", "if __name__ == '__main__':\n    main()", ""),
    ],
)
def test_a_pool_without_a_main_guard_says_so(way: str, end: str, message: str, tmp_path: Path) -> None:
    """The message that a worker died, or memory ended, sends people to look for memory."""
    program = SCRIPT + end
    path = tmp_path / "script.py"
    path.write_text(program)
    command = [sys.executable, *({"file": [str(path)], "-c": ["-c", program]}.get(way, []))]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        command, input=program if way == "stdin" else "", capture_output=True, text=True, env=environment, check=False
    )
    if message:
        assert message in done.stderr
        assert 'engine="process"' in done.stderr
    else:
        assert done.stdout == "1\n", done.stderr
