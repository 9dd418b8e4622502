"""From a folder to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from st_wkl.cli._answers import Answer, JsonOption, QuietOption, TrustOption, answering


@answering
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a student, a merged student, an adapter, or a dataset.")],
    repo: Annotated[str, typer.Argument(help="Repository on the Hub: user/name or organisation/name.")],
    dataset: Annotated[bool, typer.Option("--dataset", help="The folder is what `st-wkl build` made.")] = False,
    public: Annotated[bool, typer.Option("--public", help="Publish. Without it, only you can see it.")] = False,
    pull_request: Annotated[bool, typer.Option("--pr", help="Open a pull request instead of writing.")] = False,
    base_model: Annotated[str | None, typer.Option(help="Hub id of an adapter's base model.")] = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> Answer:
    """Push a student or a dataset to the Hub, private unless --public. Log in with `hf auth login` first."""
    from dataclasses import asdict

    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    from st_wkl.publish.hub import push_dataset, push_student

    if quiet:
        disable_progress_bars()
    built = (folder / "provenance.json").is_file() and (folder / "train.parquet").is_file()
    if built != dataset:
        kind = "a dataset: add --dataset" if built else "no dataset: leave --dataset out"
        raise ValueError(f"{folder} is {kind}.")
    if dataset:
        pushed = push_dataset(folder, repo, private=not public, create_pr=pull_request)
    else:
        pushed = push_student(
            folder,
            repo,
            private=not public,
            create_pr=pull_request,
            base_model=base_model,
            trust_remote_code=trust_remote_code,
        )
    lines = [f"{pushed.url} ({'private' if pushed.private else 'public'}, {len(pushed.files)} files)"]
    if pushed.left_out:
        lines.append(f"not part of the model, left here: {', '.join(pushed.left_out)}")
    if pushed.removed:
        lines.append(f"of an earlier push, removed there: {', '.join(pushed.removed)}")
    if public and pushed.private:
        lines.append("The repository was private before and stays so; its settings on the Hub change that.")
    return asdict(pushed), "\n".join(lines)
