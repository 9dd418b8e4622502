"""The one place that touches names which other packages do not promise to keep.

Seen in sentence-transformers 6.0 to 6.2: `base.losses.gradcache._create_minibatch` slices a batch of features and drops
the padding that a slice no longer needs; a cached loss of another model class has no public way to do the same.
"""

from __future__ import annotations

from sentence_transformers.base.losses.gradcache import _create_minibatch as create_minibatch

__all__ = ["create_minibatch"]
