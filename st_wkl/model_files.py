"""Which model does a folder hold: the files that decide its output, and their hash."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from st_wkl.files import read_object

# Whatever in a folder decides a score: weights, and what turns text into ids. Not cards, logs, optimizer states.
_TORCH_WEIGHTS = ("**/model*.safetensors", "**/pytorch_model*.bin", "**/adapter_model*.safetensors")
SETTINGS = "config.json modules.json tokenizer.json tokenizer_config.json vocab.* merges.txt *.model".split()  # noqa: SIM905
# Files of a folder that decide no score; what is not in this list counts. Cards and pictures; what training leaves; for
# generating, of which there is none, and which file holds which weight; weights and settings of other backends.
_NO_MATTER = """
    README* *.md LICENSE* NOTICE* .* *.log *.csv *.png *.jpg *.svg *.pdf *.pyc
    results.json distillation.json training_texts.json
    trainer_state.json training_args.bin optimizer.* scheduler.* scaler.* rng_state* events.out.tfevents*
    generation_config.json *.index.json
    *.onnx* ort_config.json openvino_* tf_model.h5 flax_model* rust_model.ot *.gguf *.tflite
""".split()  # noqa: SIM905
_NO_MATTER_FOLDERS = "checkpoint-* checkpoints eval runs wandb onnx openvino coreml .* __py*".split()  # noqa: SIM905
# Entries of settings files that the identity holds elsewhere, or that are what a file without them says as well.
_TOLD_ELSEWHERE: dict[str, dict[str, Any]] = {
    "config_sentence_transformers.json": dict.fromkeys(
        ("__version__", "model_type", "prompts", "default_prompt_name", "activation_fn", "similarity_fn_name")
    ),
    "sentence_bert_config.json": {
        "max_seq_length": None,
        "do_lower_case": False,
        "transformer_task": "sequence-classification",
        "module_output_name": "scores",
        "modality_config": {"text": {"method": "forward", "method_output_name": "logits"}},
    },
}


def hash_files(folder: Path, files: Iterable[Path]) -> str:
    """Return a hash of names and bytes of a folder's files, in the order given, 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        with file.open("rb") as stream:
            digest.update(
                file.relative_to(folder).as_posix().encode() + hashlib.file_digest(stream, "blake2b").digest()
            )
    return digest.hexdigest()


def onnx_file(folder: Path) -> Path | None:
    """Return the model in ONNX form, None if there is none."""
    return next((file for file in (folder / "model.onnx", folder / "onnx" / "model.onnx") if file.is_file()), None)


def exported_files(folder: Path) -> list[Path]:
    """Return the files that decide the scores of a model in ONNX form."""
    model = onnx_file(folder)
    found = [] if model is None else [model, *sorted(model.parent.glob(f"{model.name}[._]data"))]
    return [*found, *settings_files(folder)]


def torch_files(folder: Path) -> list[Path]:
    """Return the weights for torch."""
    return sorted({file for pattern in _TORCH_WEIGHTS for file in folder.glob(pattern)})


def settings_files(folder: Path) -> list[Path]:
    """Return the files beside the weights that the hash of a folder has always covered."""
    return sorted({file for pattern in SETTINGS for file in folder.glob(pattern)})


def other_files(folder: Path) -> list[Any]:
    """Return name and content of each file that `SETTINGS` does not name and that may decide a score."""
    covered = {*torch_files(folder), *settings_files(folder)}
    found: list[Any] = []
    for file in sorted(file for file in folder.rglob("*") if file.is_file() and file not in covered):
        *parents, name = file.relative_to(folder).parts
        if any(fnmatch(name, pattern) for pattern in _NO_MATTER) or any(
            fnmatch(parent, pattern) for parent in parents for pattern in _NO_MATTER_FOLDERS
        ):
            continue
        content = None if parents else _told_by(file)
        if content != {}:
            path = file.relative_to(folder).as_posix()
            found.append([path, hash_files(folder, [file]) if content is None else content])
    return found


def _told_by(file: Path) -> dict[str, Any] | None:
    """Return what a settings file says that is not said elsewhere, None where only all of it will do."""
    if file.name not in (*_TOLD_ELSEWHERE, "special_tokens_map.json", "added_tokens.json"):
        return None
    entries = read_object(file)
    if entries is None:
        return None
    if file.name == "special_tokens_map.json":
        known = read_object(file.with_name("tokenizer_config.json")) or {}
        return {name: token for name, token in entries.items() if _content(token) != _content(known.get(name))}
    if file.name == "added_tokens.json":
        tokens = (read_object(file.with_name("tokenizer.json")) or {}).get("added_tokens") or []
        ids = {token["content"]: token["id"] for token in tokens}
        return {token: number for token, number in entries.items() if ids.get(token) != number}
    neutral = _TOLD_ELSEWHERE[file.name]
    return {name: value for name, value in entries.items() if name not in neutral or neutral[name] not in (None, value)}


def _content(token: Any) -> Any:
    if isinstance(token, list):
        return [_content(one) for one in token]
    return token.get("content") if isinstance(token, dict) else token
