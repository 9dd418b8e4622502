"""Students and datasets to the Hub: in one commit, private by default, and never over the work of somebody else."""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, RepoCard, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open

from st_wkl._versions import installed_versions
from st_wkl.data.dataset import DistillationDataset
from st_wkl.markdown import is_hub_id, without_local_paths
from st_wkl.publish.front_matter import with_changes
from st_wkl.publish.model_card import BEGIN
from st_wkl.publish.saved import CLASSES, check_published, without_training_texts
from st_wkl.record import EXPOSURE_FILE, Exposure

logger = logging.getLogger(__name__)

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
_IMAGE = re.compile(r"!\[[^\]]*\]\(([\w./-]+\.(?:png|svg|jpe?g))\)")
# In a vocabulary a word that looks like a path is a word.
_VERBATIM = {"tokenizer.json", "vocab.json", "added_tokens.json"}
# What sentence-transformers and this package write into examples where the repository's name will stand.
_STAND_IN = re.compile("|".join([*(stand_in for stand_in, _ in CLASSES.values()), "path/to/this/folder"]))
_TRAILER = "Pushed with st_wkl"
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
# The base of "no answer has come" of the HTTP library that huggingface_hub uses, which has changed once.
_NO_ANSWER: type[Exception] = import_module("httpx2" if find_spec("httpx2") else "httpx").TransportError
# What to tell the user about an answer of the Hub, by its status.
_ANSWERS = {
    401: "The Hub does not accept your token: it has expired or was revoked. Make a new one at "
    "https://huggingface.co/settings/tokens and {login}; then run this again. State: {state}.",
    403: "Your token may not write to {repo}. It needs the role `write`, and you must be {owner!r} or a member who may "
    "write there (https://huggingface.co/settings/tokens); or open a pull request (`--pr`). State: {state}.",
    409: "{repo} exists, but your token cannot see it. Take another name, or a token of {owner!r}.",
    412: "Somebody changed {repo} during the push. State: {state}. Look at the change, then run this again.",
}


@dataclass(frozen=True)
class Pushed:
    """What a push has done.

    Args:
        repo_id: The repository.
        url: The commit, or the pull request.
        files: Paths in the repository that the push consists of, changed or not.
        left_out: Files of the folder that are no part of the model or dataset and stayed here.
        removed: Files of an earlier push that this one has not, removed in the same commit.
        private: Whether only you and your organisation can see it.
    """

    repo_id: str
    url: str
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    removed: tuple[str, ...]
    private: bool

    def __repr__(self) -> str:
        seen = "private" if self.private else "public"
        return f"<Pushed {self.url} ({seen}): {len(self.files)} files, {len(self.left_out)} left out>"


def push(
    what: str | Path | DistillationDataset,
    repo_id: str,
    *,
    private: bool = True,
    create_pr: bool = False,
    base_model: str | None = None,
    commit_message: str | None = None,
    trust_remote_code: bool = False,
) -> Pushed:
    """Upload a saved student (a whole model, a merged one, or an adapter) or a distillation dataset.

    Only files of the model or dataset go, with card, record and results: no checkpoints, no optimizer state, no file
    that is unknown here. Paths of this machine are cut to their last part. All becomes visible in one commit; if the
    network breaks before it, the repository is as it was, and the same call goes on. You log in with `hf auth login` or
    `HF_TOKEN`; no token passes through here. A dataset holds texts of its collection: look at their licence first.

    Args:
        what: Folder that `save_pretrained` or `distill` wrote; or a dataset, or the folder of one, whose card goes as
            it is there.
        repo_id: `"organisation/name"`.
        private: Make a new repository private, and refuse one that everybody can see. False: a new one is public, and
            one that exists stays as it is.
        create_pr: Open a pull request instead of writing; the way into a repository with the work of others.
        base_model: Hub id of an adapter's base model, where the adapter names a folder of this machine.
        commit_message: First line of the commit. Default: what is added.
        trust_remote_code: Run code of the folder to compare its weights with those of its results, and push it, for
            others need it to load the model. Only for code that you have read.

    Raises:
        ValueError: The model or dataset is not complete, its card is broken, or card or results are of other weights.
        FileNotFoundError: There is no such folder, or it is no complete dataset.
        FileExistsError: The repository holds what was not pushed with st_wkl, or changed since.
        PermissionError: Not logged in, the token has expired, or may not write there; or the repository is public.
        ConnectionError: The network broke; the message says what the repository holds now.

    Example:
        >>> push("student", "me/student").url  # doctest: +SKIP
        'https://huggingface.co/me/student/commit/…'
    """
    with tempfile.TemporaryDirectory() as workspace:
        if isinstance(what, DistillationDataset):
            folder = what.save(Path(workspace) / "dataset")
        else:
            folder = Path(what).expanduser()
        if dataset := is_dataset(folder):
            if not DistillationDataset.load(folder).provenance.get("license") and not private:
                logger.warning("the provenance names no licence: make sure that the texts may be redistributed")
            names = sorted(path.name for path in folder.iterdir() if DATASET_FILE.fullmatch(path.name))
            contents = _cleaned(folder, names, repo_id)
        else:
            contents = _student(folder, repo_id, base_model, trust_remote_code)
        files = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
        left_out = sorted({path.as_posix() for path in files if ".cache" not in path.parts} - contents.keys())
        kind, message = ("dataset", "Add a distillation dataset") if dataset else ("model", "Add a student")
        repo = _Repository(repo_id, kind, create_pr)
        url, removed = _upload(repo, contents, private, commit_message or message)
        return Pushed(repo_id, url, tuple(contents), tuple(left_out), tuple(removed), repo.private)


def push_student(folder: str | Path, repo_id: str, **options: Any) -> Pushed:
    """Upload a saved student: the name of `push` in version 0.1, which stays for one release."""
    return push(folder, repo_id, **options)


def push_dataset(dataset: DistillationDataset | str | Path, repo_id: str, **options: Any) -> Pushed:
    """Upload a distillation dataset: the name of `push` in version 0.1, which stays for one release."""
    return push(dataset, repo_id, **options)


def is_dataset(folder: Path) -> bool:
    """Tell whether a folder is that of a distillation dataset, complete or not, and not a student's."""
    return any((folder / name).is_file() for name in ("train.parquet", "provenance.json"))


def _student(folder: Path, repo_id: str, base_model: str | None, trust_remote_code: bool) -> dict[str, Path | bytes]:
    """Return path in the repository to file or content of a student; refuse what cannot be loaded again."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder; save the student there first")
    if not any((folder / name).is_file() for name in ("modules.json", "config.json", "adapter_config.json")):
        raise ValueError(
            f"{folder} holds no model: it has no modules.json, config.json or adapter_config.json. Give the folder "
            "that `save_pretrained` or `distill` wrote."
        )
    files = [path for path in folder.iterdir() if ROOT_FILE.fullmatch(path.name)]
    for name in _module_folders(folder):
        files += [path for path in (folder / name).rglob("*") if INSIDE_FILE.fullmatch(path.name)]
    files += folder.glob(".eval_results/*.yaml")
    card = folder / "README.md"
    if card.is_file():
        shown = _IMAGE.findall(card.read_text(encoding="utf-8-sig"))
        files += [folder / name for name in shown if ".." not in name and not name.startswith("/")]
    else:
        logger.warning("%s has no README.md: the student is pushed without a card", folder)
    names = sorted({path.relative_to(folder).as_posix() for path in files if path.is_file()})
    if (code := [name for name in names if name.endswith(".py")]) and not trust_remote_code:
        raise ValueError(
            f"{folder} holds code that the model is loaded with: {', '.join(code)}. Push it with "
            "trust_remote_code=True (`--trust-remote-code`) if you have read it; without it nobody could load the "
            "model."
        )
    _check_weights(folder, names)
    exposure = Exposure.load(folder)
    items = exposure.queries | exposure.positives if exposure else frozenset()
    if any(not isinstance(item, str) or not re.fullmatch(r"[0-9a-f]{16}", item) for item in items):
        raise ValueError(f"{folder / EXPOSURE_FILE} holds something other than hashes. Move it out of the folder.")
    check_published(folder, trust_remote_code=trust_remote_code)
    contents = _cleaned(folder, names, repo_id)
    if "adapter_config.json" in names:
        return contents | _adapter(folder, contents, base_model)
    if base_model is not None:
        raise ValueError(f"{folder} is no adapter, so it has no base model to name. Leave `base_model` out.")
    return contents


def _module_folders(folder: Path) -> Iterator[str]:
    """Yield the sub-folders that belong to the model: those of its modules, and exports for other backends."""
    if (folder / "modules.json").is_file():
        try:
            modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
            yield from (module["path"] for module in modules if module["path"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / 'modules.json'} is damaged ({error}). Save the student again.") from error
    yield from ("onnx", "openvino")


def _check_weights(folder: Path, names: list[str]) -> None:
    """Stop where there are no weights, or a file of them is missing or shorter than its header promises."""
    weights = [name for name in names if name.endswith(".safetensors")]
    if not weights:
        pickled = ", ".join(path.name for path in folder.glob("*.bin"))
        raise ValueError(
            f"{folder} holds no .safetensors file"
            + (f", only {pickled}, which may hold code" if pickled else "")
            + ". Save the student again with `save_pretrained`."
        )
    for name in names:
        if name.endswith("safetensors.index.json"):
            shards = set(json.loads((folder / name).read_text(encoding="utf-8"))["weight_map"].values())
            weights += [(Path(name).parent / shard).as_posix() for shard in shards]
    for name in weights:
        try:
            with safe_open(folder / name, framework="numpy"):
                pass
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{folder / name} is missing or cut off ({error}). Save the student again.") from error


def _cleaned(folder: Path, names: list[str], repo_id: str) -> dict[str, Path | bytes]:
    """Return the files, as content where they must not go as they are: with paths of this machine, or a stand-in."""
    contents: dict[str, Path | bytes] = {}
    for name in names:
        path = contents[name] = folder / name
        if path.suffix not in (".json", ".md", ".yaml") or path.name in _VERBATIM or name.endswith("index.json"):
            continue
        text = path.read_bytes().decode("utf-8")
        if path.suffix == ".json":
            new = _clean_json(text, folder, path)
        else:
            new = _without_samples(text, folder) if name == "README.md" else text
            new = _STAND_IN.sub(lambda _: repo_id, without_local_paths(new, folder))
        if new != text:
            contents[name] = new.encode()
    return contents


def _without_samples(text: str, folder: Path) -> str:
    """Return a card without training texts, unless `write_model_card` wrote it and was asked to keep them."""
    samples = re.search(r"^(widget:|\* Samples:)", text, re.MULTILINE)
    if not samples or BEGIN in text or is_dataset(folder):
        return text
    logger.warning("the samples of the training data are left out of the card: they may not be ours to pass on")
    card = ModelCard(text, ignore_metadata_errors=True)
    card.text = without_training_texts(card.text, folder)
    card.data.widget = None  # type: ignore[attr-defined]
    return with_changes(text, card)


def _clean_json(text: str, folder: Path, path: Path) -> str:
    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items()}
        if isinstance(value, list):
            return [clean(item) for item in value]
        return without_local_paths(value, folder) if isinstance(value, str) else value

    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Save the student again.") from error
    new = clean(value)
    return text if new == value else json.dumps(new, indent=2, ensure_ascii=False) + "\n"


def _adapter(folder: Path, contents: dict[str, Path | bytes], base_model: str | None) -> dict[str, Path | bytes]:
    """Return the adapter's configuration and card with a base model that others can load."""
    named = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    base = base_model or named
    if not is_hub_id(base):
        raise ValueError(
            f"{folder} is an adapter of {named!r}, which nobody else has. Name its base model on the Hub "
            "(`base_model=`, `--base-model`), or merge the adapter into the model and push that."
        )
    config = {**json.loads(_text(contents["adapter_config.json"])), "base_model_name_or_path": base}
    changed: dict[str, Path | bytes] = {"adapter_config.json": (json.dumps(config, indent=2) + "\n").encode()}
    if "README.md" in contents:
        card = ModelCard(text := _text(contents["README.md"]), ignore_metadata_errors=True)
        card.data.base_model, card.data.base_model_relation = base, "adapter"  # type: ignore[attr-defined]
        changed["README.md"] = with_changes(text, card).encode()
    return changed


def _text(content: Path | bytes) -> str:
    return (content if isinstance(content, bytes) else content.read_bytes()).decode("utf-8-sig")


@dataclass
class _Repository:
    """Where a push goes, and what is there so far; `foreign` says what in it is not ours, None if nothing."""

    id: str
    type: str
    create_pr: bool
    state: str = "nothing was sent"  # for error messages
    version: str = field(default_factory=lambda: installed_versions(("st-wkl",)).get("st-wkl", ""))
    sha: str | None = None
    private: bool = False
    files: tuple[str, ...] = ()
    foreign: str | None = None

    @property
    def api(self) -> HfApi:
        return HfApi(library_name="st_wkl", library_version=self.version)

    def look(self) -> bool:
        """Ask the Hub what is there, and return whether it exists."""
        try:
            info: Any = self.api.repo_info(self.id, repo_type=self.type)
            files = [file.rfilename for file in info.siblings or () if file.rfilename != ".gitattributes"]
            last = self.api.list_repo_commits(self.id, repo_type=self.type)[0] if files else None
        except RepositoryNotFoundError:
            return False
        self.sha, self.private, self.files, self.foreign = info.sha, bool(info.private), tuple(files), None
        if last is not None and _TRAILER not in last.message:
            self.foreign = f"its last commit is {last.title!r} by {', '.join(last.authors) or 'somebody'}"
        return True

    def open(self, private: bool) -> None:
        """Look at the repository, make it if it is new; refuse one that is not ours or not private."""
        if not self.look():
            if self.create_pr:
                raise ValueError(f"{self.id} does not exist, so it takes no pull request. Push without one to make it.")
            self.api.create_repo(self.id, repo_type=self.type, private=private)
            self.state, self.private = f"the repository {self.id} is new and empty", private
            self.look()
        elif self.foreign and not self.create_pr:
            raise FileExistsError(
                f"{self.id} has content that was not pushed with st_wkl: {self.foreign}. Nothing was sent. Take "
                "another name, or open a pull request with create_pr=True (`--pr`)."
            )
        elif private and not self.private:
            raise PermissionError(
                f"{self.id} is public, so everybody could see this. Nothing was sent. Publish it with private=False "
                "(`--public`), or take another name."
            )

    def commit(self, operations: list[Any], message: str) -> str:
        """Make the commit and return its URL; if its answer is lost, look whether it has happened."""
        parent = self.sha
        try:
            info = self.api.create_commit(
                self.id,
                operations,
                commit_message=message,
                commit_description=f"{_TRAILER} {self.version}",
                repo_type=self.type,
                create_pr=self.create_pr,
                parent_commit=parent,
            )
            return str(info.pr_url or info.commit_url)
        except _NO_ANSWER:
            before, self.state = self.state, f"it is not known whether {self.id} has the new commit or pull request"
            if self.create_pr or not self.look():
                raise
            if self.sha == parent:
                self.state = before
            if self.sha == parent or self.foreign:
                raise
            return f"{self.api.endpoint}/{'' if self.type == 'model' else f'{self.type}s/'}{self.id}/commit/{self.sha}"


def _upload(repo: _Repository, contents: dict[str, Path | bytes], private: bool, message: str) -> tuple[str, list[str]]:
    """Check everything, upload the large files, commit all at once; return the URL and what was removed."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", repo.id):
        raise ValueError(f"{repo.id!r} names no repository: it must be `user/name` or `organisation/name`")
    if get_token() is None:
        raise PermissionError(f"You are not logged in: {_LOGIN}. Nothing was sent.")
    with _explained(repo):
        _check_card(contents.get("README.md"), repo.type)
        repo.open(private)
        additions = [CommitOperationAdd(name, source) for name, source in contents.items()]
        stale = [name for name in repo.files if name not in contents and _ours(name, repo.type)]
        repo.state = (
            f"nothing of this push is visible in {repo.id}, because files appear with the commit at the end; the Hub "
            "keeps the large files that have arrived"
        )
        # Not `upload_folder`, which makes several commits where the Hub's own storage is used.
        repo.api.preupload_lfs_files(
            repo.id, additions, repo_type=repo.type, create_pr=repo.create_pr, free_memory=False
        )
        return repo.commit(
            [*additions, *(CommitOperationDelete(name, is_folder=False) for name in stale)], message
        ), stale


def _ours(name: str, repo_type: str) -> bool:
    """Say whether a file of the repository would be taken for part of the model or dataset when it is loaded."""
    if repo_type == "dataset":
        return bool(DATASET_FILE.fullmatch(name)) and name != "README.md"
    pattern = INSIDE_FILE if "/" in name else ROOT_FILE
    return bool(pattern.fullmatch(Path(name).name)) and not re.match(r"README|LICEN[CS]E|NOTICE|\.", name)


def _check_card(source: Path | bytes | None, repo_type: str) -> None:
    """Let the Hub check the card's front matter before anything is made or sent."""
    if source is None:
        return
    text = _text(source)
    remedy = "Nothing was sent. Correct the front matter of README.md."
    try:
        card = (ModelCard if repo_type == "model" else RepoCard)(text)
    except Exception as error:  # YAML errors of several kinds, and what the card's own checks raise
        raise ValueError(f"README.md: the front matter cannot be read ({error}). {remedy}") from error
    try:
        card.validate(repo_type=repo_type)
    except ValueError as error:
        raise ValueError(f"README.md: the Hub does not accept the front matter ({error}). {remedy}") from error


@contextmanager
def _explained(repo: _Repository) -> Iterator[None]:
    """Turn errors of the Hub and of the network into ones that say what to do and what the repository holds."""
    try:
        yield
    except (HfHubHTTPError, OSError, RuntimeError, _NO_ANSWER) as error:
        # An upload that fails in a thread arrives wrapped in a RuntimeError that does not say why.
        cause = error.__cause__ if type(error) is RuntimeError and error.__cause__ else error
        repo_id, state = repo.id, repo.state
        if isinstance(cause, OfflineModeIsEnabled):
            raise ConnectionError(
                f"HF_HUB_OFFLINE is set, so nothing can be pushed to {repo_id}. Unset it and run this again."
            ) from error
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code if cause.response is not None else 0
            told = _ANSWERS.get(status, "The Hub refused the push to {repo}: {cause}. State: {state}.")
            values = {"repo": repo_id, "state": state, "owner": repo_id.split("/")[0], "cause": cause}
            kind = {412: FileExistsError}.get(status, PermissionError) if status in _ANSWERS else RuntimeError
            raise kind(told.format(**values, login=_LOGIN)) from error
        if isinstance(cause, (_NO_ANSWER, ConnectionError)):
            raise ConnectionError(
                f"The connection to the Hub broke ({type(cause).__name__}). State: {state}. Your files here are as "
                "they were. Run the same command again: it sends what is missing."
            ) from error
        raise
