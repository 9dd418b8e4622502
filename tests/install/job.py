"""Install the wheel as a user does, into an environment of its own, and let it work there.

Run: python tests/install/job.py JOB [--torch REQUIREMENT] [--reuse]

    newest    the newest of everything that the index has and pyproject.toml allows
    oldest    every requirement of pyproject.toml at its floor
    pinned    the set of constraints.txt, which the tests run with
    readme    what the README's own line installs; its first snippet and its first three commands run there

The environment is `.venv-JOB` beside pyproject.toml, and is made anew unless `--reuse` is given. pip's own settings
hold (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, …). On Linux plain `torch` brings 3 GB of CUDA; `--torch` takes another.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
JOBS = ("newest", "oldest", "pinned", "readme")


def floors(project: dict) -> list[str]:
    """Return every requirement as `name==floor`, those of the onnx extra included.

    Example:
        >>> floors({"dependencies": ["peft>=0.20,<1"], "optional-dependencies": {"onnx": []}})
        ['peft==0.20']
    """
    lines = []
    for requirement in [*project["dependencies"], *project["optional-dependencies"]["onnx"]]:
        found = re.fullmatch(r"([\w.-]+)>=([\w.]+)(,<[\w.]+)?", requirement)
        if found is None:
            raise SystemExit(f"pyproject.toml: {requirement!r} has no floor to test, such as name>=1.0")
        lines.append(f"{found[1]}=={found[2]}")
    return lines


def constraints(job: str, scratch: Path, torch: str | None) -> list[str]:
    """Return pip's options that hold the versions of a job."""
    if job in ("newest", "readme"):
        return []
    if job == "pinned":
        lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    else:
        lines = floors(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"])
    if torch is not None:  # the user's choice goes first
        lines = [line for line in lines if not line.startswith("torch==")]
    file = scratch / "constraints.txt"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return ["--constraint", str(file)]


def build(scratch: Path) -> Path:
    """Build the wheel and return it."""
    run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(scratch), str(ROOT)])
    return next(scratch.glob("*.whl"))


def install(environment: Path, wheel: Path, options: list[str]) -> str:
    """Make the environment, install the wheel as the README says, and return its interpreter."""
    said = re.search(r"^pip install '?(st-wkl\S*?)'? ", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    if said is None:
        raise SystemExit("README.md has no line that installs st-wkl")
    shutil.rmtree(environment, ignore_errors=True)
    run([sys.executable, "-m", "venv", str(environment)])
    python = str(environment / "bin" / "python")
    run([python, "-m", "pip", "install", "--quiet", *options, f"{said[1]} @ {wheel.as_uri()}"])
    run([python, "-m", "pip", "check"])
    return python


def report(python: str, job: str) -> None:
    """Print the versions of what st-wkl asks for, and which of them the bounds keep behind the index."""
    pip = [python, "-m", "pip", "list", "--format", "json"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = {re.split(r"[><]", entry)[0].lower().replace("_", "-") for entry in project["dependencies"]}

    def listed(*options: str) -> list[dict[str, str]]:
        found = json.loads(subprocess.run([*pip, *options], check=True, capture_output=True, text=True).stdout)
        return [entry for entry in found if entry["name"].lower().replace("_", "-") in asked]

    print(" ".join(f"{entry['name']}=={entry['version']}" for entry in listed()), flush=True)
    if job == "newest":
        for entry in listed("--outdated"):
            print(f"the index has {entry['name']} {entry['latest_version']}; {entry['version']} is installed")


def run(command: list[str], folder: Path | None = None) -> None:
    """Run a command, or end with its exit code."""
    done = subprocess.run(command, cwd=folder, check=False)
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(command)}")


def main() -> None:
    """Do one job."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("--torch", help="requirement of torch in place of the job's own, such as torch==2.13.0")
    parser.add_argument("--reuse", action="store_true", help="take the environment that is there, with the wheel in it")
    asked = parser.parse_args()
    environment = ROOT / f".venv-{asked.job}"
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        python = str(environment / "bin" / "python")
        if not asked.reuse:
            options = [*constraints(asked.job, scratch, asked.torch or None), *([asked.torch] if asked.torch else [])]
            python = install(environment, build(scratch), options)
        report(python, asked.job)
        script = "readme.py" if asked.job == "readme" else "smoke.py"
        # -I: neither PYTHONPATH nor the folder of the script, so that nothing but the wheel can be imported.
        run([python, "-I", str(HERE / script)], folder=scratch)
    print(f"{asked.job}: everything works")


if __name__ == "__main__":
    main()
