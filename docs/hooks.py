"""Pages of the reference that are made from the code: public names, options, the command line.

mkdocs calls `on_files`; `pages` gives the same pages as text to whoever wants to look at them.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import st_wkl
from st_wkl.cli import _made
from st_wkl.pipeline import ImportConfig, RunConfig
from st_wkl.pipeline.options import described

sys.path.insert(0, str(Path(__file__).parent))
from messages import messages

# Page, its title, and the modules whose public names stand on it.
ROOMS = {
    "losses": ("Losses", ["losses", "losses.make"]),
    "functional": ("Losses as functions", ["functional"]),
    "data": ("Collections, teachers, datasets", ["data", "data.collator", "data.teacher"]),
    "training": (
        "Training",
        ["training", *(f"training.{name}" for name in ("asymmetric", "dev", "lora", "cut", "refresh"))],
    ),
    "methods": ("Methods", [f"methods.{name}" for name in ("collective", "moving_average", "paraphrases", "rounds")]),
    "evaluation": ("Evaluation", ["evaluation"]),
    "publish": ("Publishing", ["publish.model_card", "publish.licences", "publish.hub", "publish.leaderboard"]),
    "pipeline": ("Whole runs", ["pipeline"]),
    "models": ("Models, records, packaged files", ["models", "record", "packaged"]),
}
# The parts of a configuration by their key, those that may be left out included.
STAGES = {
    key: part
    for key, kind in get_type_hints(RunConfig).items()
    for part in (get_args(kind) or (kind,))
    if isinstance(part, type) and dataclasses.is_dataclass(part)
}


COMMANDS = """Every command takes `--json`, shows its progress, and goes on where it stopped when it was killed.
Wherever a Hub id fits, a folder does too, and so do `packaged:` names. `--dry-run` of `build` says how many pairs,
tokens and hours the teacher will need. The exit status is 0, 1 for an error in one line, 2 for flags that are none.
"""


def public(module: str) -> dict[str, Any]:
    """Return the public classes and functions of a module by name, in its own order."""
    found = importlib.import_module(f"st_wkl.{module}")
    names = getattr(found, "__all__", None) or [
        name for name, value in vars(found).items() if getattr(value, "__module__", "") == found.__name__
    ]
    kinds = {name: getattr(found, name) for name in names if not name.startswith("_")}
    return {name: value for name, value in kinds.items() if callable(value) and value.__doc__}


def names_page(title: str, modules: list[str], seen: set[str]) -> str:
    """Return a page that shows every public name of some modules that no page before it has shown."""
    lines = [f"# {title}", ""]
    for module in modules:
        for value in public(module).values():
            if value.__module__.startswith("st_wkl") and (home := f"{value.__module__}.{value.__name__}") not in seen:
                seen.add(home)
                lines += [f"::: {home}", ""]
    return "\n".join(lines)


def options_page() -> str:
    """Return a page with every option of every stage: its default, and what it means."""
    lines = [
        "# Options",
        "",
        "Every option is one field of a stage's dataclass. It is a flag of the command line (`--top-k`), a key of a",
        "configuration (`candidates.top_k`), and stands with the same words in `--help` and in what `st-wkl init`",
        "writes. `--set KEY=VALUE` sets any key of a configuration for one run.",
    ]
    for title, kind in [*STAGES.items(), ("A whole run", RunConfig), ("Import", ImportConfig)]:
        told = described(kind)
        part = f", the part `{title}:` of a configuration." if title in STAGES else "."
        lines += ["", f"## {title}", "", f"`{kind.__name__}`{part}", ""]
        lines += ["| option | default | what it means |", "| :-- | :-- | :-- |"]
        for entry in dataclasses.fields(kind):
            meaning = told[entry.name].replace("|", "\\|")
            lines.append(f"| `{entry.name}` | {_default(entry)} | {meaning} |")
    return "\n".join(lines) + "\n"


def _default(entry: dataclasses.Field) -> str:
    if entry.default is not dataclasses.MISSING:
        return "none" if entry.default is None else f"`{entry.default}`"
    if entry.default_factory is dataclasses.MISSING:
        return "**needed**"
    value = entry.default_factory()
    return "its own defaults" if dataclasses.is_dataclass(value) else f"`{value}`" if value else "none"


def command_line_page() -> str:
    """Return the page of the command line, as cyclopts writes it."""
    text = _made().generate_docs(output_format="markdown", recursive=True)
    # Started as a module, this process has a name that is none of the command's.
    text = re.sub(r"(?m)^(st-wkl.*?) -m mkdocs", r"\1", text)
    return text.replace("# st-wkl\n", f"# Command line\n\n{COMMANDS}\n", 1).replace("```console", "```text")


def messages_page() -> str:
    """Return the page of all messages, by room."""
    lines = [
        "# Messages",
        "",
        "What the package says where it stops or warns, by room, from the code. `…` is a name or a",
    ]
    lines += ["number. What is behind the common ones: [Troubleshooting](../troubleshooting.md).", ""]
    before = ""
    for room, kind, told in messages():
        lines += ["", f"## {room}", ""] if room != before else []
        lines.append(f"- *{kind}* {escaped(told)}")
        before = room
    return "\n".join(lines) + "\n"


def escaped(words: str) -> str:
    """Return words as Markdown shows them."""
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", words).replace("\\<", "&lt;").replace("\\>", "&gt;")


def index_page() -> str:
    """Return the page that says where each name of `st_wkl` itself is described."""
    lines = ["# Reference", "", "Made from the code: what stands here is what runs.", ""]
    lines += ["| `from st_wkl import …` | what it is |", "| :-- | :-- |"]
    for name in st_wkl.__all__:
        value = getattr(st_wkl, name)
        first = (value.__doc__ or "").strip().splitlines()[0]
        lines.append(f"| [`{name}`][{value.__module__}.{value.__name__}] | {first} |")
    lines += ["", "Rooms: " + ", ".join(f"[{title}]({page}.md)" for page, (title, _) in ROOMS.items()) + "."]
    lines += [
        "",
        "[Options](options.md) of every stage, the [command line](command-line.md), [formats](formats.md) on disk.",
    ]
    return "\n".join(lines) + "\n"


def pages() -> dict[str, str]:
    """Return all pages that are made here by their place in the site."""
    seen: set[str] = set()
    made = {f"reference/{page}.md": names_page(*room, seen) for page, room in ROOMS.items()}
    made["reference/index.md"] = index_page()
    made["reference/options.md"] = options_page()
    made["reference/command-line.md"] = command_line_page()
    made["reference/messages.md"] = messages_page()
    return made


def on_config(config: Any) -> Any:
    """Put each how-to that `mkdocs.yml` does not name at the end of its part."""
    named = re.findall(r"how-to/[\w-]+\.md", Path(config.config_file_path).read_text(encoding="utf-8"))
    there = sorted(f"how-to/{path.name}" for path in (Path(config.docs_dir) / "how-to").glob("*.md"))
    part = next(entry["How to"] for entry in config.nav if "How to" in entry)
    part += [page for page in there if page not in named]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages to those that are written by hand."""
    from mkdocs.structure.files import File

    for place, text in pages().items():
        files.append(File.generated(config, place, content=text))
    picture = Path(__file__).resolve().parents[1] / "examples/study/published/study/figures/differences.png"
    files.append(File.generated(config, "assets/differences.png", abs_src_path=str(picture)))
    return files
