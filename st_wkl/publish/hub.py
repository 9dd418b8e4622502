"""Students and datasets to the Hub: in one commit, private by default, and never over the work of somebody else."""

from __future__ import annotations

import json
import logging
import re
import struct
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from st_wkl.publish.push import DATASET_FILE, INSIDE_FILE, ROOT_FILE, Pushed, push

if TYPE_CHECKING:
    from st_wkl.data.dataset import DistillationDataset

logger = logging.getLogger(__name__)

_IMAGE = re.compile(r"!\[[^\]]*\]\(([\w./-]+\.(?:png|svg|jpe?g))\)")
# In a vocabulary a word that looks like a path is a word.
_VERBATIM = {"tokenizer.json", "vocab.json", "added_tokens.json"}
# What sentence-transformers and this package write into examples where the repository's name will stand.
_STAND_IN = re.compile(
    r"(sentence_transformers|cross_encoder|sparse_encoder|multi_vector_encoder)_model_id|path/to/this/folder"
)


def push_student(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    create_pr: bool = False,
    base_model: str | None = None,
    commit_message: str = "Add a student",
    trust_remote_code: bool = False,
) -> Pushed:
    """Upload a saved student: a whole model, a merged one, or an adapter.

    Only the files of the model go, with its card, record and results: no checkpoints, no optimizer state and no file
    that is unknown here. Paths of this machine are cut to their last part. Everything becomes visible in one commit; if
    the network breaks before it, the repository is as it was, and the same call goes on where it stopped. You log in
    with `hf auth login` or `HF_TOKEN`; no token passes through here.

    Args:
        folder: What `save_pretrained` or `distill` wrote.
        repo_id: `"organisation/name"`.
        private: Make a new repository private, and refuse one that everybody can see. False: a new one is public, and
            one that exists stays as it is.
        create_pr: Open a pull request instead of writing; the way into a repository with the work of others.
        base_model: Hub id of an adapter's base model, where the adapter names a folder of this machine.
        commit_message: First line of the commit.
        trust_remote_code: Run code of the folder to compare its weights with those of its results, and push it, for
            others need it to load the model. Only for code that you have read.

    Returns:
        Where it is, and what was uploaded, left out and removed.

    Raises:
        ValueError: The folder holds no complete model, its card is broken, or its card or results are of other weights.
        FileExistsError: The repository holds what was not pushed with st_wkl, or changed since.
        PermissionError: Not logged in, the token has expired, or may not write there; or the repository is public.
        ConnectionError: The network broke; the message says what the repository holds now.

    Example:
        >>> push_student("student", "me/student").url  # doctest: +SKIP
        'https://huggingface.co/me/student/commit/…'
    """
    folder = Path(folder).expanduser()
    files = _model_files(folder, trust_remote_code)
    contents = _cleaned(folder, files, repo_id)
    if "adapter_config.json" in files:
        contents |= _adapter(folder, contents, base_model)
    elif base_model is not None:
        raise ValueError(f"{folder} is no adapter, so it has no base model to name. Leave `base_model` out.")
    if "README.md" not in files:
        logger.warning("%s has no README.md: the student is pushed without a card", folder)
    all_files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    left_out = tuple(name for name in all_files if name not in files and ".cache/" not in name)
    sources = {name: contents.get(name, folder / name) for name in files}
    return push(repo_id, "model", sources, left_out, private, create_pr, commit_message)


def push_dataset(
    dataset: DistillationDataset | str | Path,
    repo_id: str,
    *,
    private: bool = True,
    create_pr: bool = False,
    commit_message: str = "Add a distillation dataset",
) -> Pushed:
    """Upload a distillation dataset: its three tables, its provenance and its card, in one commit.

    Texts of the collection are part of it: look at their licence before you make it public.

    Args:
        dataset: The dataset, or a folder that `save_to_disk` wrote; such a folder's card goes as it is there.
        repo_id: `"organisation/name"`.
        private: As for `push_student`.
        create_pr: As for `push_student`.
        commit_message: First line of the commit.

    Returns:
        Where it is, and what was uploaded.

    Raises:
        ValueError: A file is damaged, or the card is broken.
        FileNotFoundError: The folder is no complete dataset.
        FileExistsError: As for `push_student`.
        PermissionError: As for `push_student`.
        ConnectionError: As for `push_student`.

    Example:
        >>> push_dataset("scifact-distillation", "me/scifact-distillation")  # doctest: +SKIP
    """
    from st_wkl.data.dataset import DistillationDataset

    with tempfile.TemporaryDirectory() as workspace:
        if isinstance(dataset, DistillationDataset):
            folder = dataset.save_to_disk(Path(workspace) / "dataset")
        else:
            folder = Path(dataset).expanduser()
            dataset = DistillationDataset.load_from_disk(folder)
        if not private and not dataset.provenance.get("license"):
            logger.warning(
                "the provenance of the dataset names no licence: make sure that its texts may be redistributed"
            )
        names = [path.name for path in sorted(folder.iterdir()) if DATASET_FILE.fullmatch(path.name)]
        left_out = tuple(path.name for path in sorted(folder.iterdir()) if path.name not in names)
        contents = _cleaned(folder, names, repo_id)
        sources = {name: contents.get(name, folder / name) for name in names}
        return push(repo_id, "dataset", sources, left_out, private, create_pr, commit_message)


def _model_files(folder: Path, trust_remote_code: bool) -> list[str]:
    """Return the files of the model in `folder`, relative to it; refuse what cannot be loaded again."""
    from st_wkl.publish._weights import check_published

    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder; save the student there first")
    if not any((folder / name).is_file() for name in ("modules.json", "config.json", "adapter_config.json")):
        raise ValueError(
            f"{folder} holds no model: it has no modules.json, config.json or adapter_config.json. Give the folder "
            "that `save_pretrained` or `distill` wrote."
        )
    files = [path.name for path in folder.iterdir() if path.is_file() and ROOT_FILE.fullmatch(path.name)]
    for name in _module_folders(folder):
        inside = (path for path in (folder / name).rglob("*") if path.is_file() and INSIDE_FILE.fullmatch(path.name))
        files += [path.relative_to(folder).as_posix() for path in inside]
    files += [_relative(path, folder) for path in folder.glob(".eval_results/*.yaml")]
    if (code := [name for name in files if name.endswith(".py")]) and not trust_remote_code:
        raise ValueError(
            f"{folder} holds code that the model is loaded with: {', '.join(sorted(code))}. Push it with "
            "trust_remote_code=True (`--trust-remote-code`) if you have read it; without it nobody could load the "
            "model."
        )
    if (folder / "README.md").is_file():
        shown = _IMAGE.findall((folder / "README.md").read_text(encoding="utf-8-sig"))
        files += [image for image in shown if (folder / image).is_file() and ".." not in image]
    _check_weights(folder, files)
    _check_hashes(folder)
    check_published(folder, trust_remote_code=trust_remote_code)
    return sorted(set(files))


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _module_folders(folder: Path) -> Iterator[str]:
    """Yield the sub-folders that belong to the model: those of its modules, and exports for other backends."""
    if (folder / "modules.json").is_file():
        try:
            modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
            yield from (module["path"] for module in modules if module["path"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / 'modules.json'} is damaged ({error}). Save the student again.") from error
    yield from (name for name in ("onnx", "openvino") if (folder / name).is_dir())


def _check_weights(folder: Path, files: list[str]) -> None:
    weights = [name for name in files if name.endswith(".safetensors")]
    if not weights:
        pickled = [path.name for path in folder.glob("*.bin")]
        raise ValueError(
            f"{folder} holds no .safetensors file"
            + (f", only {', '.join(pickled)}, which may hold code" if pickled else "")
            + ". Save the student again with `save_pretrained`."
        )
    for name in files:
        if name.endswith("safetensors.index.json"):
            wanted = set(json.loads((folder / name).read_text(encoding="utf-8"))["weight_map"].values())
            weights += [_relative((folder / name).parent / shard, folder) for shard in wanted]
    for name in weights:
        if not _complete_safetensors(folder / name):
            raise ValueError(f"{folder / name} is missing or cut off. Save the student again.")


def _check_hashes(folder: Path) -> None:
    """Make sure that the file of training texts holds hashes, as this package writes it, and no text."""
    from st_wkl.record import EXPOSURE_FILE, Exposure

    exposure = Exposure.load(folder)
    items = exposure.queries | exposure.positives if exposure else frozenset()
    if any(not isinstance(item, str) or not re.fullmatch(r"[0-9a-f]{16}", item) for item in items):
        raise ValueError(f"{folder / EXPOSURE_FILE} holds something other than hashes. Move it out of the folder.")


def _complete_safetensors(path: Path) -> bool:
    """Say whether the file is as long as its header promises."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        end = max((tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"), default=0)
        return bool(path.stat().st_size == 8 + length + end)
    except (OSError, ValueError, struct.error, KeyError, TypeError, OverflowError, MemoryError):
        return False


def _cleaned(folder: Path, files: list[str], repo_id: str) -> dict[str, bytes]:
    """Return the content of those files that must not go as they are: with paths of this machine, or a stand-in."""
    from st_wkl.markdown import without_local_paths

    changed = {}
    for name in files:
        path = Path(name)
        if path.suffix not in (".json", ".md", ".yaml") or path.name in _VERBATIM or name.endswith("index.json"):
            continue
        text = (folder / name).read_bytes().decode("utf-8")
        if path.suffix == ".json":
            new = _clean_json(text, folder, folder / name)
        else:
            new = _without_samples(text, folder) if name == "README.md" else text
            new = _STAND_IN.sub(lambda _: repo_id, without_local_paths(new, folder))
        if new != text:
            changed[name] = new.encode()
    return changed


def _without_samples(text: str, folder: Path) -> str:
    """Return a card without training texts, unless `write_model_card` wrote it and was asked to keep them."""
    from huggingface_hub import ModelCard

    from st_wkl.publish._front_matter import with_changes
    from st_wkl.publish._texts import with_usage, without_training_texts
    from st_wkl.publish.model_card import BEGIN

    if BEGIN in text or (folder / "provenance.json").is_file():
        return text
    new = without_training_texts(text)
    if new == text and not re.search(r"^widget:", text, re.MULTILINE):
        return text
    logger.warning("the samples of the training data are left out of the card: they may not be ours to pass on")
    card = ModelCard(text, ignore_metadata_errors=True)
    card.text = with_usage(without_training_texts(card.text), folder)
    card.data.widget = None  # type: ignore[attr-defined]
    return with_changes(text, card)


def _clean_json(text: str, folder: Path, path: Path) -> str:
    from st_wkl.markdown import without_local_paths

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


def _adapter(folder: Path, contents: Mapping[str, bytes], base_model: str | None) -> dict[str, bytes]:
    """Return the adapter's configuration and card with a base model that others can load."""
    from huggingface_hub import ModelCard

    from st_wkl.markdown import is_hub_id
    from st_wkl.publish._front_matter import with_changes

    original = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    named = original.get("base_model_name_or_path")
    base = base_model or named
    if not is_hub_id(base):
        raise ValueError(
            f"{folder} is an adapter of {named!r}, which nobody else has. Name its base model on the Hub "
            "(`base_model=`, `--base-model`), or merge the adapter into the model and push that."
        )
    config = json.loads(contents.get("adapter_config.json", b"null")) or original
    changed = {
        "adapter_config.json": (json.dumps({**config, "base_model_name_or_path": base}, indent=2) + "\n").encode()
    }
    if (folder / "README.md").is_file():
        text = contents.get("README.md", (folder / "README.md").read_bytes()).decode("utf-8-sig")
        card = ModelCard(text, ignore_metadata_errors=True)
        card.data.base_model, card.data.base_model_relation = base, "adapter"  # type: ignore[attr-defined]
        changed["README.md"] = with_changes(text, card).encode()
    return changed
