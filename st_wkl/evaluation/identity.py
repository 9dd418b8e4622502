"""Who was evaluated: MTEB's wrapper of a model under its own name and revision.

MTEB names a local model `no_model_name/available`, a model that was fine-tuned in memory after its base, and a
cross-encoder after its folder, and looks results up by that name. Here the revision is a hash of weights and settings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from st_wkl.models import load_model, model_name, model_revision

if TYPE_CHECKING:
    from mteb.models import MTEBModels

    from st_wkl.models import AnyModel

__all__ = ["identified", "load_model", "model_name", "model_revision"]


def identified(model: AnyModel, *, name: str | None = None, revision: str | None = None) -> MTEBModels:
    """Wrap a model for MTEB under its own name and revision, so that no cache takes it for another one.

    Args:
        model: One of the four model classes.
        name: None for `model_name(model)`. MTEB wants `organization/name`; a plain name is put under `local/`.
        revision: None for `model_revision(model)`.

    Returns:
        MTEB's wrapper of the model, which `mteb.evaluate` takes, with any cache.
    """
    from mteb.models import CrossEncoderWrapper, SentenceTransformerEncoderWrapper
    from mteb.models.sentence_transformer_wrapper import MultiVectorWrapper, SparseEncoderWrapper
    from sentence_transformers import CrossEncoder, MultiVectorEncoder, SparseEncoder

    name = name or model_name(model)
    revision = revision or model_revision(model)  # before wrapping: MTEB replaces half-precision heads in place
    wrappers: dict[type, Any] = {
        CrossEncoder: CrossEncoderWrapper,
        SparseEncoder: SparseEncoderWrapper,
        MultiVectorEncoder: MultiVectorWrapper,
    }
    dense: Any = SentenceTransformerEncoderWrapper
    wrapped: Any = next((w for cls, w in wrappers.items() if isinstance(model, cls)), dense)(model)
    wrapped.mteb_model_meta = wrapped.mteb_model_meta.model_copy(
        update={"name": name if "/" in name else f"local/{name}", "revision": revision}
    )
    return cast("MTEBModels", wrapped)
