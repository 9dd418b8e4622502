"""A retriever's embeddings: dense, sparse or one for each token, computed in pieces and kept in a cache on disk."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from st_wkl.files import content_hash, replacing, set_aside

# Of a text, or of a list of texts: one matrix, or for late interaction one (tokens, D) matrix for each text.
Embeddings = Tensor | list[Tensor]


class Encoder:
    """A retriever's embeddings, normalised if its similarity is cosine, documents from the cache if they are there.

    Args:
        model: A `SentenceTransformer`, `SparseEncoder` or `MultiVectorEncoder`.
        document_prompt: Text before each document in place of the model's own prompt.
        batch_size: Texts that are encoded at once.
        cache: Folder for document embeddings; `None` keeps none.
        revision: Name of the weights where they cannot be hashed.

    Attributes:
        kind: `"dense"`, `"sparse"`, or `"multi-vector"` for one embedding for each token.

    Raises:
        TypeError: The model is of another kind.
        ValueError: Its similarity has no exact search here.
    """

    def __init__(
        self,
        model: Any,
        document_prompt: str | None,
        batch_size: int,
        cache: str | os.PathLike[str] | None,
        revision: str | None,
    ) -> None:
        from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder

        if not isinstance(model, SentenceTransformer | SparseEncoder | MultiVectorEncoder):
            raise TypeError(
                f"Expected a SentenceTransformer, a SparseEncoder or a MultiVectorEncoder, got {type(model).__name__}. "
                "Write what another retriever finds as a TREC run and read it with read_run."
            )
        similarity = str(model.similarity_fn_name)
        self.kind: Literal["dense", "sparse", "multi-vector"] = (
            "multi-vector"
            if isinstance(model, MultiVectorEncoder)
            else "sparse"
            if isinstance(model, SparseEncoder)
            else "dense"
        )
        if self.kind != "multi-vector" and similarity not in ("cosine", "dot"):
            raise ValueError(f"The model's similarity is {similarity!r}; exact search has 'cosine' and 'dot'.")
        self.model, self.batch_size, self.document_prompt = model, batch_size, document_prompt
        self.normalize = similarity == "cosine"
        self.folder: Path | None = None
        if cache is not None:
            from st_wkl.models import model_revision

            key = {
                "weights": revision or model_revision(model),
                "length": model.max_seq_length,
                "prompt": document_prompt,
                "normalized": self.normalize,
                "dtype": str(next((p.dtype for p in model.parameters()), None)),
            }
            digest = content_hash(key, size=16)
            self.folder = Path(cache).expanduser() / digest

    def queries(self, texts: Sequence[str], prompt: str | None) -> Embeddings:
        """Return float32 embeddings on the model's device, sparse ones as dense tensors."""
        embeddings = self._embed(self.model.encode_query, texts, prompt)
        return embeddings.to_dense() if self.kind == "sparse" else embeddings

    def documents(self, texts: Sequence[str], document_ids: Sequence[str]) -> Embeddings:
        """Return float32 embeddings, sparse ones in CSR layout.

        Raises:
            ValueError: An embedding holds NaN or infinity; the message names the document.
        """
        path = self._path(texts)
        embeddings = _read(path) if path is not None and path.is_file() else None
        if embeddings is None:
            embeddings = self._embed(self.model.encode_document, texts, self.document_prompt)
            if (wrong := _first_not_finite(embeddings)) is not None:
                raise ValueError(
                    f"The embedding of document {document_ids[wrong]!r} holds NaN or infinity. Check model and dtype."
                )
            if path is not None:
                _write(path, embeddings)
        if self.kind != "sparse":
            return embeddings
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            return embeddings.to_sparse_csr()

    def _embed(self, encode: Any, texts: Sequence[str], prompt: str | None) -> Any:
        options = {"prompt": prompt, "batch_size": self.batch_size, "show_progress_bar": False}
        if self.kind == "multi-vector":
            return [tokens.float() for tokens in encode(list(texts), **options)]
        embeddings = encode(list(texts), convert_to_tensor=True, **options)
        if self.kind == "sparse":
            embeddings = embeddings.coalesce().float()
            if not self.normalize:
                return embeddings
            norms = (embeddings * embeddings).sum(dim=1).to_dense().sqrt().clamp_min(1e-12)
            values = embeddings.values() / norms[embeddings.indices()[0]]
            return torch.sparse_coo_tensor(embeddings.indices(), values, embeddings.shape, is_coalesced=True)
        embeddings = embeddings.float()
        return torch.nn.functional.normalize(embeddings, dim=1) if self.normalize else embeddings

    def _path(self, texts: Sequence[str]) -> Path | None:
        if self.folder is None:
            return None
        digest = blake2b(digest_size=16)
        for text in texts:
            data = text.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
        return self.folder / f"{digest.hexdigest()}.safetensors"


def _first_not_finite(embeddings: Any) -> int | None:
    if isinstance(embeddings, list):
        return next((place for place, tokens in enumerate(embeddings) if not tokens.isfinite().all()), None)
    finite = (embeddings.to_dense() if embeddings.is_sparse else embeddings).isfinite().all(dim=1)
    return None if bool(finite.all()) else int((~finite).nonzero()[0])


def _write(path: Path, embeddings: Embeddings) -> None:
    from safetensors.torch import save_file

    if isinstance(embeddings, list):
        lengths = torch.tensor([len(tokens) for tokens in embeddings])
        tensors = {"tokens": torch.cat(embeddings).cpu(), "lengths": lengths}
    elif embeddings.is_sparse:
        embeddings = embeddings.cpu()
        tensors = {"indices": embeddings.indices().contiguous(), "values": embeddings.values().contiguous()}
        tensors["shape"] = torch.tensor(embeddings.shape)
    else:
        tensors = {"embeddings": embeddings.cpu().contiguous()}
    with replacing(path) as temporary:
        save_file(tensors, temporary)


def _read(path: Path) -> Any:
    """Return the embeddings of a file, `None` if it is damaged; it is set aside then."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
        if "embeddings" in tensors:
            return tensors["embeddings"]
        if "tokens" in tensors:
            return list(tensors["tokens"].split(tensors["lengths"].tolist()))
        shape = tensors["shape"].tolist()
        # Checked: an index out of range would be read from somebody else's memory.
        return torch.sparse_coo_tensor(
            tensors["indices"], tensors["values"], shape, is_coalesced=True, check_invariants=True
        )
    except (SafetensorError, KeyError, RuntimeError) as error:
        kept = set_aside(path)
        warnings.warn(
            f"The embeddings in {path} are damaged ({error}). The file is now {kept.name}; they are computed again.",
            stacklevel=2,
        )
        return None
