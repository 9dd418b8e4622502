"""The hash of plain values, by which files and runs know what they were made from."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def content_hash(value: Any, *, size: int = 20) -> str:
    """Return a hash of a JSON value, whatever the order of its keys.

    Args:
        value: What `json.dumps` takes.
        size: Bytes; two hexadecimal digits each.

    Example:
        >>> content_hash({"a": 1, "b": 2}, size=4) == content_hash({"b": 2, "a": 1}, size=4)
        True
    """
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=size).hexdigest()
