"""A reranker in vLLM, wherever it scores: in this process, in a worker of a pool, in an actor of Ray."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from st_wkl.data.teacher import Pair


class VllmEngine:
    """vLLM's scoring of pairs: raw logits, in batches that vLLM makes. It is loaded where the first pair is scored.

    vLLM lays a pair out as the model wants it, segments and template included, which the one prompt that Ray's own
    batch task takes could not say.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: Length or number type, which are part of the identity, are left to vLLM.
    """

    backend = "vllm"
    encoder: None = None
    prompt: None = None

    def __init__(self, model: str, max_length: int | None, dtype: str | None, **options: Any) -> None:
        if find_spec("vllm") is None:
            raise ImportError("backend='vllm' needs vLLM, which is not installed here: pip install vllm.")
        if max_length is None or dtype in (None, "auto"):
            raise ValueError(
                f"backend='vllm' needs max_length and dtype, got {max_length} and {dtype!r}: they decide scores, and "
                "the model is loaded by workers alone. Say both, such as max_length=512 and dtype='bfloat16'."
            )
        self.model, self.max_length, self.dtype, self.options = model, max_length, dtype, options
        self._loaded: Any = None

    def lengths(self, pairs: Sequence[Pair]) -> None:
        """Only vLLM knows how a pair becomes tokens."""

    def parts(self, pairs: Sequence[Pair]) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        """Yield places and logits of all pairs at once; nobody counts what is cut."""
        import vllm

        # From here on nothing has run where this package is developed: there is no vLLM.
        if self._loaded is None:
            told = {"runner": "pooling", "max_model_len": self.max_length, "dtype": self.dtype, **self.options}
            self._loaded = vllm.LLM(model=self.model, **told)
        found = self._loaded.score(
            [query for query, _ in pairs],
            [document for _, document in pairs],
            use_tqdm=False,
            pooling_params=vllm.PoolingParams(use_activation=False),
            tokenization_kwargs={"truncation": True, "max_length": self.max_length},
        )
        yield np.arange(len(pairs)), np.array([one.outputs.score for one in found], dtype=np.float32), 0
