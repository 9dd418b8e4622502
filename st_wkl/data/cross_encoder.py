"""The cross-encoder (reranker) as a teacher: which weights it holds, and its raw logits."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from huggingface_hub import hf_hub_download, snapshot_download
from sentence_transformers.util import load_file_path

from st_wkl.data.backends import FALLBACK_LENGTH, OnnxEngine, TorchEngine
from st_wkl.data.provenance import stated_license
from st_wkl.data.teacher import Pair, from_parts
from st_wkl.data.vllm import VllmEngine
from st_wkl.files import content_hash, expanded, read_json
from st_wkl.model_checks import check_complete, check_fits
from st_wkl.model_files import SETTINGS, exported_files, hash_files, onnx_file, other_files, settings_files, torch_files
from st_wkl.models import identity as model_identity
from st_wkl.models import is_retriever, model_state, own_hooks
from st_wkl.packaged import named
from st_wkl.ranges import NO_LIMIT, OptionError, check_options

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

logger = logging.getLogger(__name__)

# What `from_pretrained` could be told past an option that says more of it.
_OWN_OPTIONS = {
    **dict.fromkeys(("dtype", "torch_dtype"), "dtype is an option of its own"),
    **dict.fromkeys(("revision", "trust_remote_code"), "it is an option of its own"),
    **dict.fromkeys(("token", "use_auth_token"), "log in with `hf auth login`, or set HF_TOKEN"),
    **dict.fromkeys(("config", "state_dict", "num_labels"), "it would be another model; give a folder of that"),
}
# Rerankers that no pair of texts can be given to, by their architecture.
_LISTWISE, _LAYERWISE = ("JinaForRanking",), ("LayerWise", "CostWise")
# What decides where weights lie, and no score.
_NO_MATTER = "device_map max_memory offload_folder offload_buffers low_cpu_mem_usage cache_dir local_files_only".split()  # noqa: SIM905


class CrossEncoderTeacher:
    """A cross-encoder (reranker) that returns raw logits, whatever activation its configuration names.

    Texts are tokenised once and batched by length and a budget of tokens. Models for which only `CrossEncoder.predict`
    knows how a pair is laid out (LLM rerankers with a template, prompts, other media, several devices) go through it.

    Most rerankers end in a sigmoid by default. Scores in (0, 1) hide by how much one document is better than another,
    and a student that is trained on them learns little; hence the activation is always the identity here.

    Args:
        model: Hub id, folder, `packaged:` name, or a loaded `CrossEncoder` (for a dtype, quantisation or several
            devices of your own).
        backend: `"torch"`, `"onnx"` (extra `onnx`; a folder or repository with model.onnx or onnx/model.onnx and
            tokenizer.json, run by onnxruntime directly), `"vllm"` (where it is installed; `max_length` and `dtype` have
            to be said, `model_kwargs` are those of `vllm.LLM`), or `"auto"`: ONNX for a folder with nothing else.
        max_length: Tokens of a pair; longer ones are cut. `None` takes the model's own, or 512 where it names none.
        batch_tokens: Tokens of one forward pass, padding included; `None` takes 2,048 on a CPU (1,024 with ONNX;
            small batches stay in its cache) and 32,768 on a GPU. Lower it when memory ends.
        batch_size: Pairs of one forward pass at most, beside the budget of tokens; `None` sets no limit (64 where
            `CrossEncoder.predict` has to make the batches).
        dtype: `"float32"`, `"bfloat16"`, `"float16"`, `"auto"` (bfloat16 where the device multiplies in it, else
            float32), or `None` for the model's own. Torch only.
        revision: Branch, tag or commit of a Hub id. The commit it resolves to becomes part of the identity.
        device: `"cpu"`, `"cuda"`, ...; `None` lets sentence-transformers choose (ONNX: the CPU, with all its cores).
            Workers of a pool or of Ray have a GPU each, unless it has a number, as in `"cuda:1"`.
        trust_remote_code: Run code of the model's repository. Only for repositories that you have read.
        prompt: Instruction for rerankers that take one; `None` takes the model's default.
        model_kwargs: What `from_pretrained` of transformers is told besides, `{"attn_implementation": "eager"}` or
            `{"quantization_config": {"load_in_4bit": True}}`. All of it is part of the identity, except where the
            weights lie (`device_map` and the like). Torch only.

    Attributes:
        truncated_pairs: Number of pairs so far that were longer than `max_length` and lost their end.

    Raises:
        FileNotFoundError: The folder does not exist or holds no model for the backend.
        ImportError: ONNX without onnxruntime.
        ValueError: The model has more than one label or weights that were made at random, or an option does not fit.

    Example:
        >>> teacher = CrossEncoderTeacher("cross-encoder/ms-marco-MiniLM-L12-v2")  # doctest: +SKIP
        >>> teacher.score([("how many people live in Berlin", "Berlin has 3.5 million inhabitants.")])  # doctest: +SKIP
        array([9.1], dtype=float32)
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | CrossEncoder,
        *,
        backend: Literal["auto", "torch", "onnx", "vllm"] = "auto",
        max_length: int | None = None,
        batch_tokens: int | None = None,
        batch_size: int | None = None,
        dtype: Literal["float32", "bfloat16", "float16", "auto"] | None = None,
        revision: str | None = None,
        device: str | None = None,
        trust_remote_code: bool = False,
        prompt: str | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        options: dict[str, Any] = {name: value for name, value in locals().items() if name not in ("self", "model")}
        if backend not in ("auto", "torch", "onnx", "vllm"):
            raise ValueError(f'backend must be "auto", "torch", "onnx" or "vllm", got {backend!r}.')
        if dtype not in (None, "auto", "float32", "bfloat16", "float16"):
            raise ValueError(f'dtype must be "auto", "float32", "bfloat16" or "float16", got {dtype!r}.')
        check_options(max_length=max_length, batch_size=batch_size, batch_tokens=batch_tokens)
        told = _plain_kwargs(model_kwargs or {})
        self._made_from, self.truncated_pairs = (model, options), 0
        make: Any = _from_source if isinstance(model, (str, os.PathLike)) else _from_loaded
        self._engine, name, revision, settings = make(model, **options)
        self._identity: dict[str, Any] = {
            "kind": "cross-encoder",
            "model": name,
            "revision": revision,
            "backend": self._engine.backend,
            "dtype": self._engine.dtype,
            "max_length": self._engine.max_length,
            "activation": "identity",
            "prompt": self._engine.prompt,
        }
        if settings is not None:
            self._identity["settings"] = f"blake2b:{settings}"
        if told:
            self._identity["model_kwargs"] = told
        self._state = self._state_of_loaded()

    def __repr__(self) -> str:
        told = ("model", "backend", "dtype", "max_length")
        return f"CrossEncoderTeacher({', '.join(f'{name}={self._identity[name]!r}' for name in told)})"

    @property
    def identity(self) -> dict[str, Any]:
        """Model, revision (commit, or hash of the weights), backend, dtype, length, activation, prompt, model_kwargs.

        `settings` is a hash of what else decides a score where the revision does not cover it: adapters, tokenizer,
        modules and configuration of a loaded model, settings files of a folder. The size of the batches is no part of
        the identity: it moves scores by rounding only.
        """
        return dict(self._identity)

    def _state_of_loaded(self) -> Any:
        """Return what shows at once that a loaded model, which its owner may train or switch, is another one now."""
        model = self._made_from[0]
        return None if isinstance(model, (str, os.PathLike)) else model_state(model)

    @property
    def device(self) -> str | None:
        """The device that was asked for, by which workers decide whether each has its own."""
        return self._made_from[1]["device"]

    @property
    def license(self) -> str | None:
        """The licence that the model's card states; None where it states none or there is no card."""
        model = self._made_from[0]
        if isinstance(model, (str, os.PathLike)):
            return stated_license(model)
        return model.model_card_data.license

    def token_lengths(self, pairs: Sequence[Pair]) -> np.ndarray | None:
        """Return the tokens of each of n pairs, special ones included, before anything is cut, int64 of shape (n,).

        `score_pairs` sorts by them. The texts' token ids are remembered for the calls of `score` that follow. `None`
        where `CrossEncoder.predict` alone knows how a pair becomes tokens.
        """
        return self._engine.lengths(pairs)

    def __getstate__(self) -> dict[str, Any]:
        """Travel to a worker as what it was made from: sessions of onnxruntime cannot, and weights need not."""
        return {"made_from": self._made_from, "identity": self._identity}

    def __setstate__(self, state: dict[str, Any]) -> None:
        model, options = state["made_from"]
        self.__init__(model, **options)  # type: ignore[misc]
        if self._identity != state["identity"]:
            raise ValueError(f"The worker loaded {self._identity}, but the teacher is {state['identity']}.")

    def score(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Return the raw logits of n pairs in any order, float32 of shape (n,); they are sorted by length inside.

        Raises:
            ValueError: The model returns more than one number for a pair, or is another one than at the beginning.
        """
        return from_parts(self.score_parts(pairs), len(pairs))

    def score_parts(self, pairs: Sequence[Pair]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the places of each batch in `pairs` and their raw logits, as they are finished: what can be kept.

        Raises:
            ValueError: As `score`.
        """
        if not len(pairs):
            return
        if self._state_of_loaded() != self._state:
            raise ValueError(
                "The CrossEncoder was changed after it became a teacher (its weights, adapters, tokenizer or "
                "settings), so its scores belong under another identity. Make a new CrossEncoderTeacher of it."
            )
        before = self.truncated_pairs
        for places, scores, cut in self._engine.parts(list(pairs)):
            self.truncated_pairs += cut
            yield places, scores
        cut = self.truncated_pairs - before
        logger.debug("Scored %d pairs; %d were longer than %s tokens", len(pairs), cut, self._engine.max_length)


_Made = tuple[
    TorchEngine | OnnxEngine | VllmEngine, str, str, str | None
]  # engine, name, revision, hash of further settings


def _from_loaded(
    model: CrossEncoder, *, batch_tokens: int | None, batch_size: int | None, prompt: str | None, **options: Any
) -> _Made:
    kept = ("max_length", "dtype", "revision", "device", "model_kwargs")
    if options["backend"] in ("onnx", "vllm") or any(options[name] for name in kept):
        raise ValueError(
            "A loaded CrossEncoder keeps its own backend, max_length, dtype, revision and device, and model_kwargs "
            "are for one that is loaded by name."
        )
    name = _loaded_name(model)
    check_complete(model, "teacher")  # which may lower its length, a part of the identity
    if hooks := own_hooks(model):
        raise ValueError(
            f"The CrossEncoder has forward hooks of your own ({', '.join(hooks)}), and nothing tells what they "
            "make of its scores. Remove them, or ask the model in a function: CallableTeacher(function, "
            "name=..., version=...)."
        )
    known = model_identity(model)
    engine = TorchEngine(model, batch_tokens, batch_size, prompt)
    return engine, name, f"blake2b:{known['weights']}", known["settings"]


def _from_source(
    source: str | os.PathLike[str],
    *,
    backend: str,
    max_length: int | None,
    batch_tokens: int | None,
    batch_size: int | None,
    dtype: str | None,
    revision: str | None,
    device: str | None,
    trust_remote_code: bool,
    prompt: str | None,
    model_kwargs: Mapping[str, Any] | None,
) -> _Made:
    model = str(named(expanded(source))[0])
    folder = Path(model)
    local = folder.is_dir()
    if not local and (model.count("/") > 1 or model.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"There is no folder {model}. Give a folder with a cross-encoder or a Hub id.")
    name = folder.resolve().name if local else model
    if backend == "onnx" or (backend == "auto" and local and onnx_file(folder) and not torch_files(folder)):
        if prompt is not None or dtype is not None or model_kwargs:
            raise ValueError("The onnx backend takes no prompt, no dtype and no model_kwargs. Use the torch backend.")
        if not local:  # the Hub's cache names the folder of a snapshot after its commit
            patterns = ["model.onnx*", "onnx/model.onnx*", *SETTINGS]
            folder = Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
        engine = OnnxEngine(folder, max_length, batch_tokens, batch_size, device)
        return engine, name, _hash(folder, exported_files(folder)) if local else folder.name, None
    _check_kind(name, folder if local else None, model, revision)
    if local:
        if not (weights := torch_files(folder)):
            found = f" It has {onnx_file(folder)}: use backend='onnx'." if onnx_file(folder) else ""
            raise FileNotFoundError(f"{folder} has no weights for torch (model.safetensors).{found}")
        commit = _hash(folder, [*weights, *settings_files(folder)])
    else:  # the commit that a branch stands for, from the cache where there is no network
        commit = Path(hf_hub_download(model, "config.json", revision=revision)).parent.name
    if backend == "vllm":
        if prompt is not None or device is not None or batch_tokens is not None or batch_size is not None:
            raise ValueError("vLLM makes its own batches on the GPU that it is given: no prompt, device or batch size.")
        told = {**(model_kwargs or {}), "trust_remote_code": trust_remote_code, "revision": None if local else commit}
        settings = content_hash(other_files(folder), size=16) if local and other_files(folder) else None
        return VllmEngine(model, max_length, dtype, **told), name, commit, settings
    if dtype is not None:
        model_kwargs = {**(model_kwargs or {}), "dtype": _fast_dtype(device) if dtype == "auto" else dtype}
    loaded = _load_cross_encoder(model, max_length, commit, device, trust_remote_code, model_kwargs)
    check_complete(loaded, "teacher")
    settings = _settings_beyond(folder if local else None, loaded)
    return TorchEngine(loaded, batch_tokens, batch_size, prompt), name, commit, settings


def _check_kind(name: str, folder: Path | None, model: str, revision: str | None) -> None:
    """Refuse rerankers that would load, or nearly, and then not be asked as they were trained to be.

    Raises:
        ValueError: With what to do instead.
    """
    found = load_file_path(model, "config.json", revision=revision) if folder is None else folder / "config.json"
    config = read_json(found) if found and Path(found).is_file() else {}
    architecture = str((config.get("architectures") or [""])[0])
    if architecture in _LISTWISE:
        raise ValueError(
            f"{name} ({architecture}) ranks a whole list at once, so a pair has no score of its own. Let its own code "
            "score lists, in a class with `identity` and `score_lists`, see ListTeacher and docs/teachers.md."
        )
    if architecture.startswith(_LAYERWISE):
        raise ValueError(
            f"{name} ({architecture}) scores at a layer that is chosen when it is asked, by code of its own. Ask it in "
            "a function: CallableTeacher(lambda pairs: reranker.compute_score(pairs, cutoff_layers=[28]), name=..., "
            "version='layer 28', batched=True), with FlagEmbedding's reranker."
        )
    modules = load_file_path(model, "modules.json", revision=revision) if folder is None else folder / "modules.json"
    if architecture.endswith("ForCausalLM") and not (modules and Path(modules).is_file()):
        raise ValueError(
            f"{name} is a language model ({architecture}) without modules.json, which says in what words it is asked "
            "and which tokens are its answers: sentence-transformers would compare 'yes' and 'no' after the bare pair, "
            "and other numbers than its own would come of it. Take its revision or conversion for "
            "sentence-transformers 5.4 or later, or save one yourself as docs/teachers.md shows."
        )


def _hash(folder: Path, files: list[Path]) -> str:
    return f"blake2b:{hash_files(folder, files)}"


def _load_cross_encoder(
    model: str | os.PathLike[str],
    max_length: int | None,
    commit: str,
    device: str | None,
    trust_remote_code: bool,
    model_kwargs: Mapping[str, Any] | None,
) -> CrossEncoder:
    from sentence_transformers import CrossEncoder

    try:
        loaded = CrossEncoder(
            str(model),
            revision=None if Path(model).is_dir() else commit,
            max_length=max_length,
            device=device,
            trust_remote_code=trust_remote_code,
            model_kwargs=dict(model_kwargs or {}),
        )
    except Exception as error:
        if not is_retriever(model):
            raise
        raise ValueError(
            f"{Path(model).name} is a retriever, which embeds texts one by one, and no cross-encoder. A teacher reads "
            "query and document together: take a reranker, such as packaged:ms-marco-MiniLM-L12-v2, or let a retriever "
            "teach through SimilarityTeacher (teacher.kind: retriever) or FeedbackTeacher."
        ) from error
    check_fits(loaded, max_length)
    if loaded.max_seq_length is None or loaded.max_seq_length > NO_LIMIT:
        loaded.max_seq_length = FALLBACK_LENGTH
    return loaded


def _plain_kwargs(told: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of the model's arguments can change a score, as JSON values.

    Raises:
        ValueError: One of them is an option of its own, or says nothing that could be compared.
    """
    for name in told:
        if name in _OWN_OPTIONS:
            raise OptionError(f"model_kwargs.{name}", f"is not for model_kwargs: {_OWN_OPTIONS[name]}.")
    plain = {name: _as_json(name, value) for name, value in told.items() if name not in _NO_MATTER}
    return dict(sorted(plain.items()))


def _as_json(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _as_json(f"{name}.{key}", one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(name, one) for one in value]
    if value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if hasattr(value, "to_dict"):  # a configuration of quantisation
        return _as_json(name, value.to_dict())
    raise OptionError(f"model_kwargs.{name}", f"is {value!r:.80}, which no identity can hold: give text or numbers.")


def _fast_dtype(device: str | None) -> str:
    """Return bfloat16 where the processor has instructions for it. Without them it is emulated, and slower."""
    from sentence_transformers.util import get_device_name

    kind = torch.device(device or get_device_name()).type
    if kind == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    # `get_capabilities` came with torch 2.10; before it, float32 is the safe answer.
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)() if kind == "cpu" else {}
    return "bfloat16" if found.get("avx512_bf16") or found.get("amx_bf16") else "float32"


def _settings_beyond(folder: Path | None, loaded: CrossEncoder) -> str | None:
    """Return a hash of what decides a score and stands neither in the revision nor in the identity, None if nothing.

    The revision of a folder is a hash of the weights and of the files in `SETTINGS`, which covers most rerankers.
    """
    told: list[Any] = [] if folder is None else other_files(folder)
    config = getattr(loaded, "config", None)
    elsewhere = any("--" in str(path) for path in (getattr(config, "auto_map", None) or {}).values())
    if elsewhere or getattr(loaded.transformers_model, "peft_config", None):  # code or base of another repository
        told.append(model_identity(loaded))
    return content_hash(told, size=16) if told else None


def _loaded_name(model: CrossEncoder) -> str:
    if not hasattr(model, "predict") or not hasattr(model, "num_labels"):
        remedy = " Wrap a function: CallableTeacher(function, name=..., version=...)." if callable(model) else ""
        if hasattr(model, "encode_query"):
            remedy = " A retriever teaches through SimilarityTeacher or FeedbackTeacher."
        raise TypeError(f"A teacher is a Hub id, a folder or a CrossEncoder, got {type(model).__name__}.{remedy}")
    if model.model_card_data.base_model:
        return str(model.model_card_data.base_model)
    path = getattr(getattr(model.transformers_model, "config", None), "_name_or_path", "") or type(model).__name__
    return Path(path).name if Path(path).is_absolute() else str(path)
