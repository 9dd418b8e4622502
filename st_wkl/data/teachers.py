"""Teachers: what gives a (query, document) pair its score."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

logger = logging.getLogger(__name__)

_FALLBACK_LENGTH = 512
# Tokenizers without a limit of their own say 1e30; no reranker reads this many tokens on purpose.
_NO_LIMIT = 1_000_000
# Whatever in a folder decides a score: weights, and what turns text into ids. Not cards, logs, optimizer states.
_TORCH_WEIGHTS = ("**/model*.safetensors", "**/pytorch_model*.bin", "**/adapter_model*.safetensors")
_SETTINGS = (
    "config.json",
    "modules.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.*",
    "merges.txt",
    "*.model",
)


class Teacher(Protocol):
    """What the builder needs of a teacher. Any object with these two members is one."""

    @property
    def identity(self) -> dict[str, str | int | float | None]:
        """Everything that decides a score, in plain JSON values. Two teachers that score differently never share it."""

    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Return raw scores, float32 of shape (n,), for n `(query, document)` texts, in their order."""


class CrossEncoderTeacher:
    """A cross-encoder (reranker) that returns raw logits, whatever activation its configuration names.

    Most rerankers end in a sigmoid by default. Scores in (0, 1) hide by how much one document is better than another,
    and a student that is trained on them learns little; hence the activation is always the identity here.

    Args:
        model: Hub id, folder, or a loaded `CrossEncoder` (for a dtype, quantisation or several devices of your own).
        backend: `"torch"`, `"onnx"` (extra `onnx`; a folder or repository with model.onnx or onnx/model.onnx and
            tokenizer.json, run by onnxruntime directly), or `"auto"`: ONNX for a folder with nothing else.
        max_length: Tokens of a pair; longer ones are cut. `None` takes the model's own, or 512 where it names none.
        batch_size: Pairs in one forward pass. 64 suits small rerankers; lower it for large ones.
        revision: Branch, tag or commit of a Hub id. The commit it resolves to becomes part of the identity.
        device: `"cpu"`, `"cuda"`, ...; `None` lets sentence-transformers choose (ONNX: the CPU, with all its cores).
        trust_remote_code: Run code of the model's repository. Only for repositories that you have read.
        prompt: Instruction for rerankers that take one; `None` takes the model's default.

    Attributes:
        truncated_pairs: Number of pairs so far that were longer than `max_length` and lost their end.

    Raises:
        FileNotFoundError: The folder does not exist or holds no model for the backend.
        ImportError: ONNX without onnxruntime.
        ValueError: The model has more than one label, or an option does not fit.

    Example:
        >>> teacher = CrossEncoderTeacher("cross-encoder/ms-marco-MiniLM-L12-v2")  # doctest: +SKIP
        >>> teacher.score([("how many people live in Berlin", "Berlin has 3.5 million inhabitants.")])  # doctest: +SKIP
        array([9.1], dtype=float32)
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | CrossEncoder,
        *,
        backend: Literal["auto", "torch", "onnx"] = "auto",
        max_length: int | None = None,
        batch_size: int = 64,
        revision: str | None = None,
        device: str | None = None,
        trust_remote_code: bool = False,
        prompt: str | None = None,
    ) -> None:
        if backend not in ("auto", "torch", "onnx"):
            raise ValueError(f'backend must be "auto", "torch" or "onnx", got {backend!r}.')
        if batch_size < 1 or (max_length is not None and max_length < 8):
            raise ValueError(f"batch_size must be positive and max_length 8 or more, got {batch_size}, {max_length}.")
        self.truncated_pairs = 0
        self._engine: _TorchEngine | _OnnxEngine
        if not isinstance(model, (str, os.PathLike)):
            if backend == "onnx" or (max_length, revision, device) != (None, None, None):
                raise ValueError("A loaded CrossEncoder keeps its own backend, max_length, revision and device.")
            name, commit = _loaded_name(model), f"blake2b:{_hash_parameters(model)}"
            self._engine = _TorchEngine(model, batch_size, prompt)
        else:
            folder = Path(model)
            if not folder.is_dir() and (str(model).count("/") > 1 or str(model).startswith((".", "/", "~"))):
                raise FileNotFoundError(f"There is no folder {model}. Give a folder with a cross-encoder or a Hub id.")
            if backend == "auto":
                backend = "onnx" if folder.is_dir() and _onnx_file(folder) and not _torch_files(folder) else "torch"
            name = folder.resolve().name if folder.is_dir() else str(model)
            if backend == "onnx":
                if prompt is not None:
                    raise ValueError("The ONNX backend takes no prompt. Use the torch backend.")
                local = folder.is_dir()
                folder = folder if local else _download_onnx(str(model), revision)
                self._engine = _OnnxEngine(folder, max_length, batch_size, device)
                # The Hub's cache names the folder of a snapshot after its commit.
                commit = f"blake2b:{_hash_files(folder, self._engine.files)}" if local else folder.name
            else:
                commit = _local_commit(folder) if folder.is_dir() else _hub_commit(str(model), revision)
                loaded = _load_cross_encoder(model, max_length, commit, device, trust_remote_code)
                self._engine = _TorchEngine(loaded, batch_size, prompt)
        self._identity: dict[str, str | int | float | None] = {
            "kind": "cross-encoder",
            "model": name,
            "revision": commit,
            "backend": "torch" if isinstance(self._engine, _TorchEngine) else "onnx",
            "dtype": self._engine.dtype,
            "max_length": self._engine.max_length,
            "activation": "identity",
            "prompt": self._engine.prompt,
        }

    @property
    def identity(self) -> dict[str, str | int | float | None]:
        """Model, revision (commit, or hash of the weights), backend, dtype, length, activation and prompt.

        The batch size is no part of it: it moves scores by rounding only.
        """
        return dict(self._identity)

    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Return the raw logits of `pairs`.

        Args:
            pairs: n `(query, document)` texts, in any order; they are sorted by length inside.

        Returns:
            float32 of shape (n,).

        Raises:
            ValueError: The model returns more than one number for a pair.
        """
        if not len(pairs):
            return np.empty(0, dtype=np.float32)
        scores, truncated = self._engine.logits([(query, document) for query, document in pairs])
        self.truncated_pairs += truncated
        logger.info("Scored %d pairs; %d were longer than %s tokens", len(pairs), truncated, self._engine.max_length)
        return scores


class _TorchEngine:
    """`CrossEncoder.predict` with the identity activation."""

    def __init__(self, model: CrossEncoder, batch_size: int, prompt: str | None) -> None:
        if model.num_labels != 1:
            raise ValueError(
                f"The cross-encoder has {model.num_labels} labels. A teacher gives one number for a pair: take a "
                "reranker with num_labels=1."
            )
        self.model, self.batch_size = model, batch_size
        default = model.default_prompt_name
        self.prompt = prompt if prompt is not None or default is None else model.prompts.get(default)
        parameter = next(model.parameters(), None)
        if parameter is None:
            raise ValueError(
                "The CrossEncoder holds no torch weights, so nothing tells its scores from another model's. Give its "
                "folder or Hub id instead, with backend='onnx'."
            )
        self.dtype = str(parameter.dtype).removeprefix("torch.")
        self.max_length = model.max_seq_length

    def logits(self, pairs: list[tuple[str, str]]) -> tuple[np.ndarray, int]:
        import torch

        scores = self.model.predict(
            pairs,
            batch_size=self.batch_size,
            prompt=self.prompt,
            activation_fn=torch.nn.Identity(),
            show_progress_bar=False,
        )
        return np.asarray(scores, dtype=np.float32), self._count_truncated(pairs)

    def _count_truncated(self, pairs: list[tuple[str, str]]) -> int:
        """Count the pairs over `max_length`. `predict` does not tell, so those that may be are tokenised once more."""
        if self.model.tokenizer is None or self.max_length is None:
            return 0
        # A token is at least one character, so most pairs need no second look. Prompts and templates are not counted.
        suspects = [pair for pair in pairs if len(pair[0]) + len(pair[1]) > self.max_length - 4]
        if not suspects:
            return 0
        queries, documents = map(list, zip(*suspects, strict=True))
        ids = self.model.tokenizer(queries, documents, truncation=False, padding=False, verbose=False)["input_ids"]
        return sum(len(row) > self.max_length for row in ids)


class _OnnxEngine:
    """A sequence-classification model in ONNX form, run as it is: no optimum, no torch."""

    prompt: None = None
    dtype = "as exported"

    def __init__(self, folder: Path, max_length: int | None, batch_size: int, device: str | None) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError("The ONNX backend needs onnxruntime: pip install st-wkl[onnx]") from error
        from tokenizers import Tokenizer

        model, tokenizer = _onnx_file(folder), folder / "tokenizer.json"
        if model is None or not tokenizer.is_file():
            raise FileNotFoundError(
                f"{folder} lacks {'model.onnx (or onnx/model.onnx)' if model is None else 'tokenizer.json'}, which the "
                "ONNX backend needs."
            )
        self.files = [model, *sorted(model.parent.glob(f"{model.name}[._]data")), *_settings(folder)]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = _cores()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(model, options, providers=_providers(device))
        self.inputs = {value.name for value in self.session.get_inputs()}
        if unknown := self.inputs - {"input_ids", "attention_mask", "token_type_ids"}:
            raise ValueError(
                f"{model} wants the inputs {sorted(unknown)}, which a cross-encoder for text does not have."
            )
        self.tokenizer = Tokenizer.from_file(str(tokenizer))
        config_file = folder / "tokenizer_config.json"
        config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
        own = config.get("model_max_length") or (self.tokenizer.truncation or {}).get("max_length")
        self.max_length = int(max_length or (own if own and own < _NO_LIMIT else _FALLBACK_LENGTH))
        self.batch_size = batch_size
        self.pad_id = (self.tokenizer.padding or {}).get("pad_id", self.tokenizer.token_to_id("[PAD]") or 0)
        # A tokenizer.json often carries the padding to 512 of its export, which would cost three times the work.
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(self.max_length, strategy="longest_first")

    def logits(self, pairs: list[tuple[str, str]]) -> tuple[np.ndarray, int]:
        encodings = self.tokenizer.encode_batch(pairs)
        order = sorted(range(len(pairs)), key=lambda place: -len(encodings[place].ids))
        scores = np.empty(len(pairs), dtype=np.float32)
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            scores[places] = self._forward([encodings[place] for place in places])
        return scores, sum(bool(encoding.overflowing) for encoding in encodings)

    def _forward(self, batch: list[Any]) -> np.ndarray:
        shape = (len(batch), len(batch[0].ids))  # the first is the longest
        features = {
            "input_ids": np.full(shape, self.pad_id, dtype=np.int64),
            "attention_mask": np.zeros(shape, dtype=np.int64),
            "token_type_ids": np.zeros(shape, dtype=np.int64),
        }
        for row, encoding in enumerate(batch):
            length = len(encoding.ids)
            features["input_ids"][row, :length] = encoding.ids
            features["attention_mask"][row, :length] = 1
            features["token_type_ids"][row, :length] = encoding.type_ids
        output = self.session.run(None, {name: features[name] for name in self.inputs})[0]
        if output.size != len(batch):
            raise ValueError(
                f"The ONNX model returns shape {output.shape} for {len(batch)} pairs. A teacher gives one number for a "
                "pair: take a reranker with one label."
            )
        return output.reshape(-1).astype(np.float32)


def _load_cross_encoder(
    model: str | os.PathLike[str], max_length: int | None, commit: str, device: str | None, trust_remote_code: bool
) -> CrossEncoder:
    from sentence_transformers import CrossEncoder

    loaded = CrossEncoder(
        str(model),
        revision=None if Path(model).is_dir() else commit,
        max_length=max_length,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    if loaded.max_seq_length is None or loaded.max_seq_length > _NO_LIMIT:
        loaded.max_seq_length = _FALLBACK_LENGTH
    return loaded


def _local_commit(folder: Path) -> str:
    weights = _torch_files(folder)
    if not weights:
        found = f" It has {_onnx_file(folder)}: use backend='onnx'." if _onnx_file(folder) else ""
        raise FileNotFoundError(f"{folder} has no weights for torch (model.safetensors).{found}")
    return f"blake2b:{_hash_files(folder, [*weights, *_settings(folder)])}"


def _hub_commit(repo_id: str, revision: str | None) -> str:
    """Resolve a branch to the commit that is used, from the cache where there is no network."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repo_id, "config.json", revision=revision)).parent.name


def _download_onnx(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["model.onnx*", "onnx/model.onnx*", *_SETTINGS]
    return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))


def _onnx_file(folder: Path) -> Path | None:
    return next((file for file in (folder / "model.onnx", folder / "onnx" / "model.onnx") if file.is_file()), None)


def _torch_files(folder: Path) -> list[Path]:
    return sorted({file for pattern in _TORCH_WEIGHTS for file in folder.glob(pattern)})


def _settings(folder: Path) -> list[Path]:
    return sorted({file for pattern in _SETTINGS for file in folder.glob(pattern)})


def _hash_files(folder: Path, files: list[Path]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        with file.open("rb") as stream:
            digest.update(
                file.relative_to(folder).as_posix().encode() + hashlib.file_digest(stream, "blake2b").digest()
            )
    return digest.hexdigest()


def _hash_parameters(model: CrossEncoder) -> str:
    import torch

    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(data)
    return digest.hexdigest()


def _loaded_name(model: CrossEncoder) -> str:
    if not hasattr(model, "predict") or not hasattr(model, "num_labels"):
        raise TypeError(f"A teacher is a Hub id, a folder or a CrossEncoder, got {type(model).__name__}.")
    if model.model_card_data.base_model:
        return str(model.model_card_data.base_model)
    path = getattr(getattr(model.transformers_model, "config", None), "_name_or_path", "") or type(model).__name__
    return Path(path).name if Path(path).is_absolute() else str(path)


def _cores() -> int:
    # The cores that this process may use, which in a container are fewer than the machine has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _providers(device: str | None) -> list[str]:
    if device is None or device == "cpu":
        return ["CPUExecutionProvider"]
    import onnxruntime

    name = {"cuda": "CUDAExecutionProvider", "mps": "CoreMLExecutionProvider"}.get(device.split(":")[0], device)
    if name not in onnxruntime.get_available_providers():
        raise ValueError(
            f"onnxruntime cannot use the device {device!r} here; it has {onnxruntime.get_available_providers()}. "
            "Install its build for that device, or use device='cpu'."
        )
    return [name, "CPUExecutionProvider"]
