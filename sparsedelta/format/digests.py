"""Identity is content (FORMAT §9): digests of tensors, fingerprints of checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from blake3 import blake3

_DOMAIN = b"sparsedelta fingerprint 1\0"


def fingerprint(tensors: Iterable[tuple[str, str, Sequence[int], bytes]]) -> bytes:
    """Return a checkpoint's 32-byte fingerprint; it does not depend on order or sharding.

    Args:
        tensors: name, dtype name, shape and whole 32-byte digest of each tensor.
    """
    hasher = blake3(_DOMAIN)
    for name, dtype, shape, digest in sorted(tensors, key=lambda item: item[0].encode("utf-8")):
        coded_name, coded_dtype = name.encode("utf-8"), dtype.encode("ascii")
        hasher.update(len(coded_name).to_bytes(4, "little") + coded_name)
        hasher.update(len(coded_dtype).to_bytes(1, "little") + coded_dtype)
        hasher.update(len(shape).to_bytes(4, "little"))
        hasher.update(b"".join(size.to_bytes(8, "little") for size in shape))
        hasher.update(digest)
    return hasher.digest()
