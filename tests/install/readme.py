"""The README's first snippet and its first three commands, as they stand there, without the Hub.

Run: python -I tests/install/readme.py    (in an environment that the wheel is installed in)

The collection and the table that they name are small ones here; that is all.
"""

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.append(str(Path(__file__).resolve().parent))

from smoke import animals

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    """Run them in a folder that is thrown away."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    snippet = re.findall(r"```python\n(.*?)```", text, flags=re.S)[0]
    blocks = "".join(re.findall(r"```bash\n(.*?)```", text, flags=re.S))
    commands = re.findall(r"^st-wkl [^#\n]*", blocks, flags=re.M)[:3]
    assert len(commands) == 3
    collection = animals()
    Path("scifact").symlink_to(Path("animals").resolve())
    rows = [f"{key},{text.removesuffix(' water')},do {text}" for key, text in collection.documents.items()]
    Path("faq.csv").write_text("\n".join(["nr,answer,asked", *rows]), encoding="utf-8")
    Path("snippet.py").write_text(snippet, encoding="utf-8")
    subprocess.run([sys.executable, "-I", "snippet.py"], check=True)
    for command in commands:
        print(f"$ {command}", flush=True)
        subprocess.run([sys.executable, "-I", "-m", "st_wkl", *shlex.split(command)[1:]], check=True)
    assert "nDCG@10" in Path("run/student/README.md").read_text(encoding="utf-8")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        main()
