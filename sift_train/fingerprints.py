"""Fingerprints of training data: a run resumes only with the data that it began with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def fingerprint_of(items: Iterable[object]) -> str:
    """Return 16 hexadecimal digits that depend on the ``repr`` of all items, in their order."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(f"{item!r}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]
