"""How files get to the Hub: checks first, then the large files, then one commit; and errors that say what is there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from st_wkl._versions import installed_versions

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# What a saved model of sentence-transformers, transformers or peft consists of, and what this package puts beside it.
# Anything else, such as checkpoints, optimizer states and training texts, stays here.
ROOT_FILE = re.compile(
    r"(config|generation_config|modules|config_sentence_transformers|sentence_\w+_config|adapter_config|router_config|"
    r"\w*processor_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|"
    r"distillation|results|training_texts|"  # the last holds hashes, by which `evaluate` knows seen queries
    r"[\w.-]*safetensors\.index)\.json|(vocab|merges)\.txt|[\w.-]+\.(safetensors|model|tiktoken|jinja)|"
    r"README\.md|\w+\.py|(LICEN[CS]E|NOTICE)(\.(md|txt))?"
)
INSIDE_FILE = re.compile(r"[\w.-]+\.(json|safetensors|txt|model|tiktoken|jinja|onnx|onnx_data|xml|py)")
DATASET_FILE = re.compile(r"(train|queries|documents)\.parquet|provenance\.json|README\.md")
_TRAILER = "Pushed with st_wkl"
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
_SETTINGS = "https://huggingface.co/settings/tokens"


@dataclass(frozen=True)
class Pushed:
    """What a push has done.

    Args:
        repo_id: The repository.
        url: The commit, or the pull request.
        files: Paths in the repository that the push consists of, changed or not.
        left_out: Files of the folder that are no part of the model and stayed here.
        removed: Files of an earlier push that this one has not, removed in the same commit.
        private: Whether only you and your organisation can see it.
    """

    repo_id: str
    url: str
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    removed: tuple[str, ...]
    private: bool


def push(
    repo_id: str,
    repo_type: str,
    sources: Mapping[str, Path | bytes],
    left_out: tuple[str, ...],
    private: bool,
    create_pr: bool,
    commit_message: str,
) -> Pushed:
    """Check everything, then upload `sources` (path in the repository to file or content) and commit them at once."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", repo_id):
        raise ValueError(f"{repo_id!r} names no repository: it must be `user/name` or `organisation/name`")
    if get_token() is None:
        raise PermissionError(f"You are not logged in: {_LOGIN}. Nothing was sent.")
    version = installed_versions(("st-wkl",)).get("st-wkl", "")
    target = _Target(HfApi(library_name="st_wkl", library_version=version), repo_id, repo_type, create_pr)
    with _explained(target):
        _check_card(sources, repo_type)
        there = _opened(target, private)
        additions = [CommitOperationAdd(name, source) for name, source in sources.items()]
        stale = tuple(name for name in there.files if name not in sources and _ours(name, repo_type))
        deletions = [CommitOperationDelete(name, is_folder=False) for name in stale]
        target.state = (
            f"nothing of this push is visible in {repo_id}, because files appear with the commit at the end; the Hub "
            "keeps the large files that have arrived"
        )
        target.api.preupload_lfs_files(repo_id, additions, repo_type=repo_type, create_pr=create_pr, free_memory=False)
        url = _commit(target, [*additions, *deletions], there, commit_message, f"{_TRAILER} {version}")
    return Pushed(repo_id, url, tuple(sources), left_out, stale, there.private)


@dataclass
class _Target:
    """Where a push goes, and what is there so far, for the error message."""

    api: HfApi
    repo_id: str
    repo_type: str
    create_pr: bool
    state: str = "nothing was sent"


def _opened(target: _Target, private: bool) -> _There:
    """Return what the repository holds, made if it is new; refuse one that is not ours or not private."""
    repo_id, there = target.repo_id, _look(target)
    if there is None:
        if target.create_pr:
            raise ValueError(f"{repo_id} does not exist, so it takes no pull request. Push without one to make it.")
        target.api.create_repo(repo_id, repo_type=target.repo_type, private=private)
        target.state = f"the repository {repo_id} is new and empty"
        return _look(target) or _There("", private, [], None)
    if there.foreign and not target.create_pr:
        raise FileExistsError(
            f"{repo_id} has content that was not pushed with st_wkl: {there.foreign}. Nothing was sent. Take another "
            "name, or open a pull request with create_pr=True (`--pr`)."
        )
    if private and not there.private:
        raise PermissionError(
            f"{repo_id} is public, so everybody could see this. Nothing was sent. Publish it with private=False "
            "(`--public`), or take another name."
        )
    return there


def _commit(target: _Target, operations: list[Any], there: _There, message: str, trailer: str) -> str:
    """Make the commit and return its URL; if its answer is lost, look whether it has happened."""
    api, repo_id, repo_type = target.api, target.repo_id, target.repo_type
    try:
        info = api.create_commit(
            repo_id,
            operations,
            commit_message=message,
            commit_description=trailer,
            repo_type=repo_type,
            create_pr=target.create_pr,
            parent_commit=there.sha or None,
        )
        return str(info.pr_url or info.commit_url)
    except _transport_error():
        before, target.state = target.state, f"it is not known whether {repo_id} has the new commit or pull request"
        now = None if target.create_pr else _look(target)
        if now is not None and now.sha == there.sha:
            target.state = before
        if now is None or now.sha == there.sha or now.foreign:
            raise
        return f"{api.endpoint}/{'' if repo_type == 'model' else f'{repo_type}s/'}{repo_id}/commit/{now.sha}"


def _ours(name: str, repo_type: str) -> bool:
    """Say whether a file of the repository would be taken for part of the model or dataset when it is loaded."""
    if repo_type == "dataset":
        return bool(DATASET_FILE.fullmatch(name)) and name != "README.md"
    pattern = INSIDE_FILE if "/" in name else ROOT_FILE
    return bool(pattern.fullmatch(Path(name).name)) and not re.match(r"README|LICEN[CS]E|NOTICE|\.", name)


@dataclass(frozen=True)
class _There:
    """What a repository holds; `foreign` says what in it is not ours, None if nothing."""

    sha: str
    private: bool
    files: list[str]
    foreign: str | None


def _look(target: _Target) -> _There | None:
    from huggingface_hub.errors import RepositoryNotFoundError

    api, repo_id, repo_type = target.api, target.repo_id, target.repo_type
    try:
        info = api.repo_info(repo_id, repo_type=repo_type)
        files = [file.rfilename for file in getattr(info, "siblings", None) or [] if file.rfilename != ".gitattributes"]
        last = api.list_repo_commits(repo_id, repo_type=repo_type)[0] if files else None
    except RepositoryNotFoundError:
        return None
    foreign = None
    if last is not None and _TRAILER not in last.message:
        foreign = f"its last commit is {last.title!r} by {', '.join(last.authors) or 'somebody'}"
    return _There(str(info.sha), bool(info.private), files, foreign)


def _check_card(sources: Mapping[str, Path | bytes], repo_type: str) -> None:
    """Let the Hub check the card's front matter before anything is made or sent."""
    from huggingface_hub import ModelCard, RepoCard

    source = sources.get("README.md")
    if source is None:
        return
    text = source.decode() if isinstance(source, bytes) else source.read_bytes().decode("utf-8-sig")
    remedy = "Nothing was sent. Correct the front matter of README.md"
    try:
        card = ModelCard(text) if repo_type == "model" else RepoCard(text)
    except Exception as error:  # YAML errors of several kinds, and what the card's own checks raise
        raise ValueError(f"README.md: the front matter cannot be read ({error}). {remedy}.") from error
    try:
        card.validate(repo_type=repo_type)
    except ValueError as error:
        raise ValueError(f"README.md: the Hub does not accept the front matter ({error}). {remedy}.") from error


@contextmanager
def _explained(target: _Target) -> Iterator[None]:
    """Turn errors of the Hub and of the network into ones that say what to do and what the repository holds."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except (HfHubHTTPError, OSError, RuntimeError, _transport_error()) as error:
        # An upload that fails in a thread arrives wrapped in a RuntimeError that does not say why.
        cause = error.__cause__ if type(error) is RuntimeError and error.__cause__ else error
        if isinstance(cause, OfflineModeIsEnabled):
            raise ConnectionError(
                f"HF_HUB_OFFLINE is set, so nothing can be pushed to {target.repo_id}. Unset it and run this again."
            ) from error
        if isinstance(cause, HfHubHTTPError):
            raise _refused(cause, target) from error
        if isinstance(cause, (_transport_error(), ConnectionError)):
            raise ConnectionError(
                f"The connection to the Hub broke ({type(cause).__name__}). State: {target.state}. Your files here are "
                "as they were. Run the same command again: it sends what is missing."
            ) from error
        raise


def _refused(error: Any, target: _Target) -> Exception:
    """Return what to tell the user about an answer of the Hub."""
    status = error.response.status_code if error.response is not None else None
    owner = target.repo_id.split("/")[0]
    if status == 401:
        return PermissionError(
            f"The Hub does not accept your token: it has expired or was revoked. Make a new one at {_SETTINGS} and "
            f"{_LOGIN}; then run this again. State: {target.state}."
        )
    if status == 403:
        return PermissionError(
            f"Your token may not write to {target.repo_id}. It needs the role `write`, and you must be {owner!r} or a "
            f"member who may write there ({_SETTINGS}); or open a pull request (`--pr`). State: {target.state}."
        )
    if status == 409:
        return PermissionError(
            f"{target.repo_id} exists, but your token cannot see it. Take another name, or a token of {owner!r}."
        )
    if status == 412:
        return FileExistsError(
            f"Somebody changed {target.repo_id} during the push. State: {target.state}. Look at the change, then run "
            "this again."
        )
    return RuntimeError(f"The Hub refused the push to {target.repo_id}: {error}. State: {target.state}.")


def _transport_error() -> type[Exception]:
    """Return the base of "no answer has come" of the HTTP library that huggingface_hub uses, which has changed once."""
    from importlib import import_module
    from importlib.util import find_spec

    error: type[Exception] = import_module("httpx2" if find_spec("httpx2") else "httpx").TransportError
    return error
