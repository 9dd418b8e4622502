"""How a cross-encoder turns pairs into logits: token ids once, batches by a budget of tokens, torch or ONNX."""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer

from st_wkl.data.teacher import Pair, TextPairs
from st_wkl.model_files import onnx_file
from st_wkl.ranges import NO_LIMIT

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

logger = logging.getLogger(__name__)

Row = tuple[list[int], list[int]]  # ids of the tokens, and of the segments that they belong to

FALLBACK_LENGTH = 512
# On a CPU the activations of a batch should stay in its cache: 2,048 tokens of a small model are about 12 MB, and
# larger batches were slower, down to 1,024 with int8 weights. Fixed numbers, not fractions of the cores at hand: the
# same run on another machine has the same batches. A GPU wants many rows.
CPU_BATCH_TOKENS, ONNX_BATCH_TOKENS, GPU_BATCH_TOKENS = 2_048, 1_024, 32_768
_PREDICT_BATCH_SIZE = 64
_TOKENIZE_AT_ONCE = 1_024
_PROBED = 256  # tokens at which cutting is compared with the tokenizer's own; the rule is the same at any length
_CACHED_TOKENS = 64_000_000  # 256 MB; the texts beyond are tokenised again when their turn comes


class _Template(NamedTuple):
    """What stands before, between and behind the two texts of a pair: token ids, and the segments of the texts."""

    special: tuple[list[int], list[int], list[int]]
    special_types: tuple[list[int], list[int], list[int]]
    types: tuple[int, int]

    @property
    def size(self) -> int:
        return sum(map(len, self.special))

    def fill(self, first: Sequence[int], second: Sequence[int]) -> Row:
        before, between, behind = self.special
        kinds, (left, right) = self.special_types, self.types
        types = [*kinds[0], *[left] * len(first), *kinds[1], *[right] * len(second), *kinds[2]]
        return [*before, *first, *between, *second, *behind], types


class PairEncoder:
    """Token ids of pairs. Each text is tokenised once, however many pairs it stands in.

    Args:
        tokenizer: A tokenizer that encodes pairs; it is copied, its own padding and truncation are left alone.
        max_length: Tokens of a pair at most, special tokens included; the longer text is cut first.
    """

    def __init__(self, tokenizer: Tokenizer, max_length: int) -> None:
        self.max_length = max_length
        # A tokenizer.json often carries the padding to 512 of its export, which would cost three times the work.
        self._texts = Tokenizer.from_str(tokenizer.to_str())
        self._texts.no_padding()
        self._texts.no_truncation()
        self._pairs = Tokenizer.from_str(self._texts.to_str())
        self._pairs.enable_truncation(max_length, strategy="longest_first")
        self._cache: dict[str, tuple[np.ndarray, int]] = {}
        self._cached_tokens = 0
        self._template = _find_template(self._texts)
        if self._template and not self._agrees():
            self._template = None

    def lengths(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Return the tokens of each pair before anything is cut, int64 of shape (n,), and remember the texts' ids."""
        self._cache, self._cached_tokens = {}, 0
        if self._template is None:
            found: list[int] = []
            for start in range(0, len(pairs), _TOKENIZE_AT_ONCE):
                found += map(len, self._texts.encode_batch(list(pairs[start : start + _TOKENIZE_AT_ONCE])))
            return np.array(found, dtype=np.int64)
        return TextPairs.of(pairs).sizes(self._sizes) + self._template.size

    def _sizes(self, texts: Sequence[str]) -> np.ndarray:
        sizes = {text: known[1] for text, known in self._tokenized(texts, keep=True)}
        return np.fromiter(map(sizes.__getitem__, texts), dtype=np.int64, count=len(texts))

    def encode(self, pairs: Sequence[Pair]) -> tuple[list[Row], int]:
        """Return token ids and segment ids of each pair, cut to `max_length`, and how many pairs were cut."""
        lengths, cut, row = self.plan(pairs)
        return [row(place) for place in range(len(lengths))], cut

    def plan(self, pairs: Sequence[Pair]) -> tuple[np.ndarray, int, Callable[[int], Row]]:
        """Return how long each pair's row is, how many pairs are cut, and what makes a row when its turn comes."""
        if self._template is None:
            encodings = self._pairs.encode_batch(list(pairs))
            cut = sum(bool(encoding.overflowing) for encoding in encodings)
            lengths = np.array([len(encoding) for encoding in encodings], dtype=np.int64)
            return lengths, cut, lambda place: (encodings[place].ids, encodings[place].type_ids)
        template, texts = self._template, dict(self._tokenized((text for pair in pairs for text in pair), keep=False))
        room = self.max_length - template.size
        sizes = np.array([(texts[first][1], texts[second][1]) for first, second in pairs]).reshape(-1, 2)
        whole = sizes.sum(axis=1)

        def row(place: int) -> Row:
            (first_ids, first_size), (second_ids, second_size) = map(texts.__getitem__, pairs[place])
            first_room, second_room = _longest_first(first_size, second_size, room)
            return template.fill(first_ids[:first_room].tolist(), second_ids[:second_room].tolist())

        return np.minimum(whole, room) + template.size, int((whole > room).sum()), row

    def _tokenized(self, texts: Iterable[str], keep: bool) -> Iterator[tuple[str, tuple[np.ndarray, int]]]:
        cache, new = self._cache, []  # another thread may start its own
        for text in dict.fromkeys(texts):
            if text in cache:
                yield text, cache[text]
            else:
                new.append(text)
        for start in range(0, len(new), _TOKENIZE_AT_ONCE):
            part = new[start : start + _TOKENIZE_AT_ONCE]
            encodings = self._texts.encode_batch(part, add_special_tokens=False)
            for text, encoding in zip(part, encodings, strict=True):
                # No more than `max_length` tokens of a text can be read; its full size decides how a pair is cut.
                found = np.array(encoding.ids[: self.max_length], dtype=np.int32), len(encoding)
                if keep and self._cached_tokens < _CACHED_TOKENS:
                    cache[text] = found
                    self._cached_tokens += len(found[0])
                yield text, found

    def _agrees(self) -> bool:
        """Compare with the tokenizer's own pairs, whole and cut on either side."""
        asked, self.max_length = self.max_length, min(self.max_length, _PROBED)
        self._pairs.enable_truncation(self.max_length, strategy="longest_first")
        long, longer = "red green " * self.max_length, "blue " * (2 * self.max_length + 1)
        probes = [("a cat", "dogs run, 12!"), ("", ""), ("a", long), (long, "a"), (long, longer), (longer, long)]
        expected = [(encoding.ids, encoding.type_ids) for encoding in self._pairs.encode_batch(probes)]
        agrees = self.encode(probes)[0] == expected
        self.max_length = asked
        self._pairs.enable_truncation(asked, strategy="longest_first")
        return agrees


def _find_template(tokenizer: Tokenizer) -> _Template | None:
    encoding = tokenizer.encode("red", "blue")
    places = [[at for at, sequence in enumerate(encoding.sequence_ids) if sequence == side] for side in (0, 1)]
    if not all(places) or places[0][-1] > places[1][0]:
        return None
    (start, end), (begin, stop) = ((found[0], found[-1] + 1) for found in places)
    ids, types = encoding.ids, encoding.type_ids
    return _Template(
        (ids[:start], ids[end:begin], ids[stop:]),
        (types[:start], types[end:begin], types[stop:]),
        (types[start], types[begin]),
    )


def _longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Share `room` tokens between two texts as the tokenizers library does: the longer one is cut first."""
    short, long = min(first, second), max(first, second)
    if short + long > room:
        long = short if short > room else max(short, room - short)
        if short + long > room:
            short = room // 2
            long = short + room % 2
    return (long, short) if first > second else (short, long)


def token_batches(lengths: Sequence[int], batch_tokens: int, batch_size: int | None = None) -> Iterator[slice]:
    """Cut pairs, the longest first, into batches of at most `batch_tokens` after padding, or of one pair."""
    start = 0
    while start < len(lengths):
        count = max(1, batch_tokens // max(1, lengths[start]))
        yield slice(start, start := min(len(lengths), start + min(count, batch_size or count)))


def _padded(rows: Sequence[Row], pad_id: int, pad_type: int = 0) -> dict[str, np.ndarray]:
    shape = (len(rows), len(rows[0][0]))  # the first is the longest
    features = {
        "input_ids": np.full(shape, pad_id, dtype=np.int64),
        "attention_mask": np.less.outer(np.arange(shape[1]), [len(ids) for ids, _ in rows]).T.astype(np.int64),
        "token_type_ids": np.full(shape, pad_type, dtype=np.int64),
    }
    for place, (ids, types) in enumerate(rows):
        features["input_ids"][place, : len(ids)] = ids
        features["token_type_ids"][place, : len(ids)] = types
    return features


class _BudgetEngine:
    """What both backends share: token ids, order, batches. `_forward` is the rest."""

    encoder: PairEncoder | None
    batch_tokens: int
    batch_size: int | None
    # Batches that are under way while the one before them is fetched and kept: a GPU computes, and need not wait for
    # the next one to be tokenised and padded; on a CPU there is nothing to gain.
    ahead = 0

    def lengths(self, pairs: Sequence[Pair]) -> np.ndarray | None:
        return None if self.encoder is None else self.encoder.lengths(pairs)

    def parts(self, pairs: Sequence[Pair]) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        """Yield places and logits of each batch, and how many pairs of it were cut."""
        assert self.encoder is not None
        lengths, cut, row = self.encoder.plan(pairs)
        order = np.argsort(-lengths, kind="stable")
        begun: deque[tuple[np.ndarray, Any]] = deque()
        for batch in token_batches(lengths[order].tolist(), self.batch_tokens, self.batch_size):
            places = order[batch]
            begun.append((places, self._forward([row(place) for place in places.tolist()])))
            if len(begun) > self.ahead:
                done, output = begun.popleft()
                yield done, _fetched(output), cut
                cut = 0  # all are counted with the first batch
        for done, output in begun:
            yield done, _fetched(output), cut
            cut = 0

    def _forward(self, rows: list[Row]) -> Any:
        raise NotImplementedError


def _fetched(output: Any) -> np.ndarray:
    """Return what a batch has given, once it is there."""
    if isinstance(output, torch.Tensor):
        output = output.float().cpu().numpy()
    found: np.ndarray = output.reshape(-1)
    return found


class TorchEngine(_BudgetEngine):
    """A torch `CrossEncoder`: own batches where they are exact, else `CrossEncoder.predict`; never an activation."""

    backend = "torch"

    def __init__(
        self, model: CrossEncoder, batch_tokens: int | None, batch_size: int | None, prompt: str | None
    ) -> None:
        if model.num_labels != 1:
            raise ValueError(
                f"The cross-encoder has {model.num_labels} labels. A teacher gives one number for a pair: take a "
                "reranker with num_labels=1."
            )
        default = model.default_prompt_name
        self.prompt = prompt if prompt is not None or default is None else model.prompts.get(default)
        parameter = next(model.parameters(), None)
        if parameter is None:
            raise ValueError(
                "The CrossEncoder holds no torch weights, so nothing tells its scores from another model's. Give its "
                "folder or Hub id instead, with backend='onnx'."
            )
        self.model, self.batch_size = model, batch_size
        self.batch_tokens = batch_tokens or (CPU_BATCH_TOKENS if parameter.device.type == "cpu" else GPU_BATCH_TOKENS)
        self.dtype = str(parameter.dtype).removeprefix("torch.")
        self.ahead = int(parameter.device.type == "cuda")
        self.max_length = model.max_seq_length
        self.reason = why_predict(model, self.prompt)
        self.encoder = (
            None if self.reason else PairEncoder(model.tokenizer.backend_tokenizer, int(self.max_length or 0))
        )
        if self.reason:
            logger.info("Scoring through CrossEncoder.predict, since %s.", self.reason)

    def parts(self, pairs: Sequence[Pair]) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        """Yield places and logits of each batch, and how many pairs of it were cut."""
        if self.encoder is not None:
            yield from super().parts(pairs)
            return
        scores = self.model.predict(
            list(pairs),
            batch_size=self.batch_size or _PREDICT_BATCH_SIZE,
            prompt=self.prompt,
            activation_fn=torch.nn.Identity(),
            show_progress_bar=False,
        )
        yield np.arange(len(pairs)), np.asarray(scores, dtype=np.float32), self._count_cut(pairs)

    def _forward(self, rows: list[Row]) -> torch.Tensor:
        tokenizer: Any = self.model.tokenizer
        features: dict[str, Any] = {
            name: torch.from_numpy(values).to(self.model.device)
            for name, values in _padded(rows, tokenizer.pad_token_id, tokenizer.pad_token_type_id).items()
            if name in tokenizer.model_input_names
        }
        self.model.eval()
        # Through the model's own call, as `predict` does, so that a compiled model stays compiled.
        with torch.inference_mode():
            scores: torch.Tensor = self.model({**features, "modality": "text"})["scores"]
        return scores

    def _count_cut(self, pairs: Sequence[Pair]) -> int:
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


def why_predict(model: CrossEncoder, prompt: str | None) -> str | None:
    """Return why only `CrossEncoder.predict` scores this model exactly, or `None` where own batches do as well."""
    import sentence_transformers
    from sentence_transformers.base.modules import Transformer

    module = model[0] if len(model) else None
    tokenizer: Any = getattr(module, "tokenizer", None)
    checks = {
        "its class is no plain CrossEncoder": type(model) is not sentence_transformers.CrossEncoder,
        "it is made of several modules": len(model) != 1 or type(module) is not Transformer,
        "it is no sequence classifier": getattr(module, "transformer_task", None) != "sequence-classification",
        "it runs on another backend": getattr(module, "backend", None) != "torch",
        "it reads chat messages or other media": set(getattr(module, "modality_config", ())) != {"text"},
        "it takes a prompt": bool(prompt),
        "it has processing options of its own": bool(getattr(module, "processing_kwargs", None)),
        "it packs its inputs for flash attention": bool(getattr(module, "can_flatten_inputs", False)),
        "it is spread over devices": len({parameter.device for parameter in model.parameters()}) != 1
        or getattr(getattr(module, "model", None), "hf_device_map", None) is not None
        or getattr(model, "_distributed_inference", None) is not None,
        "its tokenizer is no plain fast one": not getattr(tokenizer, "is_fast", False)
        or not hasattr(tokenizer, "backend_tokenizer")
        or getattr(tokenizer, "pad_token_id", None) is None
        or getattr(tokenizer, "padding_side", "") != "right"
        or getattr(tokenizer, "truncation_side", "") != "right"
        or not set(tokenizer.model_input_names) <= {"input_ids", "attention_mask", "token_type_ids"},
        "it has no maximum length": not 8 <= (model.max_seq_length or 0) < NO_LIMIT,
    }
    return next((reason for reason, holds in checks.items() if holds), None)


class OnnxEngine(_BudgetEngine):
    """A sequence-classification model in ONNX form, run as it is: no optimum, no torch."""

    backend = "onnx"
    prompt: None = None
    dtype = "as exported"
    encoder: PairEncoder

    def __init__(
        self,
        folder: Path,
        max_length: int | None,
        batch_tokens: int | None,
        batch_size: int | None,
        device: str | None,
    ) -> None:
        model, file = onnx_file(folder), folder / "tokenizer.json"
        if model is None or not file.is_file():
            raise FileNotFoundError(
                f"{folder} lacks {'model.onnx (or onnx/model.onnx)' if model is None else 'tokenizer.json'}, which the "
                "onnx backend needs."
            )
        self.session = _session(model, device)
        self.inputs = {value.name for value in self.session.get_inputs()}
        if unknown := self.inputs - {"input_ids", "attention_mask", "token_type_ids"}:
            raise ValueError(
                f"{model} wants the inputs {sorted(unknown)}, which a cross-encoder for text does not have."
            )
        tokenizer = Tokenizer.from_file(str(file))
        config_file = folder / "tokenizer_config.json"
        config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
        own = config.get("model_max_length") or (tokenizer.truncation or {}).get("max_length")
        self.max_length = int(max_length or (own if own and own < NO_LIMIT else FALLBACK_LENGTH))
        self.batch_size = batch_size
        self.batch_tokens = batch_tokens or (ONNX_BATCH_TOKENS if device in (None, "cpu") else GPU_BATCH_TOKENS)
        self.pad_id = (tokenizer.padding or {}).get("pad_id", tokenizer.token_to_id("[PAD]") or 0)
        self.encoder = PairEncoder(tokenizer, self.max_length)
        if max_length is not None and (not own or max_length > own):
            self._check_length()

    def _check_length(self) -> None:
        """Read one pair of the greatest length: a model without the positions for it shall fail at once."""
        try:
            self._forward([([self.pad_id] * self.max_length, [0] * self.max_length)])
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(
                f"max_length is {self.max_length:,}. Lower it: the exported model cannot read so much "
                f"({str(error)[:200]})."
            ) from error

    def _forward(self, rows: list[Row]) -> Any:
        features = _padded(rows, self.pad_id)
        output = self.session.run(None, {name: features[name] for name in self.inputs})[0]
        if output.size != len(rows):
            raise ValueError(
                f"The exported model returns shape {output.shape} for {len(rows)} pairs. A teacher gives one number "
                "for a pair: take a reranker with one label."
            )
        return output.astype(np.float32)


def cores() -> int:
    """Return the cores that this process may use: OMP_NUM_THREADS, or those of its container."""
    if os.environ.get("OMP_NUM_THREADS", "").isdecimal():
        return max(1, int(os.environ["OMP_NUM_THREADS"]))
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _session(model: Path, device: str | None) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError("The ONNX backend needs onnxruntime: pip install st-wkl[onnx]") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cores()
    options.log_severity_level = 3
    providers: list[Any] = ["CPUExecutionProvider"]
    if device not in (None, "cpu"):
        kind, _, number = device.partition(":")
        name = {"cuda": "CUDAExecutionProvider", "mps": "CoreMLExecutionProvider"}.get(kind, device)
        if name not in onnxruntime.get_available_providers():
            raise ValueError(
                f"onnxruntime cannot use the device {device!r} here; it has {onnxruntime.get_available_providers()}. "
                "Install its build for that device, or use device='cpu'."
            )
        providers.insert(0, (name, {"device_id": number}) if number and name != device else name)
    return onnxruntime.InferenceSession(model, options, providers=providers)
