"""What `st-wkl init` writes: a configuration to start from, with every option."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Any

import yaml

from st_wkl.pipeline.options import RunConfig, described


def template(
    name: str = "config.yaml",
    *,
    collection: str = "mteb/nfcorpus",
    teacher: str = "cross-encoder/ms-marco-MiniLM-L12-v2",
    student: str = "minishlab/potion-base-8M",
    output: str = "run",
) -> str:
    """Return a configuration to start from: every option with its default and what it means.

    Example:
        >>> from st_wkl.pipeline import RunConfig
        >>> RunConfig.from_dict(yaml.safe_load(template())).student.model
        'minishlab/potion-base-8M'
    """
    parts = {"collection": {"source": collection}, "teacher": {"model": teacher}, "student": {"model": student}}
    made = RunConfig.from_dict({"output": output, **parts})
    head = (
        f"A whole run of st-wkl: `st-wkl run {name}`. Run it again after a crash, and it goes on where it was. "
        "`--set training.learning_rate=1e-3` overrides a key for one run; what is left out has the value shown here."
    )
    return _comment(head, "") + _commented(made, "")


def _commented(options: Any, indent: str) -> str:
    told, lines = described(type(options)), ""
    for entry in dataclasses.fields(options):
        value = getattr(options, entry.name)
        lines += ("" if indent else "\n") + _comment(told[entry.name], indent)
        if dataclasses.is_dataclass(value):
            lines += f"{indent}{entry.name}:\n{_commented(value, indent + '  ')}"
        else:
            plain = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1000)
            lines += f"{indent}{entry.name}: {plain.removesuffix('...' + chr(10))}"
    return lines


def _comment(text: str, indent: str) -> str:
    return textwrap.fill(text, 110, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ") + "\n"
