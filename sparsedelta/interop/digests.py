"""The digests that other projects write: each algorithm as a function from bytes to text."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from typing import Any

from blake3 import blake3

from sparsedelta.errors import Corrupt, UnsupportedFeature

Digest = Callable[[memoryview], str]


def adler32(data: memoryview) -> str:
    """Return the Adler-32 checksum as 8 hexadecimal digits."""
    return f"{zlib.adler32(data):08x}"


def blake3_hex(data: memoryview) -> str:
    """Return the BLAKE3 digest, 64 hexadecimal digits."""
    return blake3(data).hexdigest()


def xxh3_128(data: memoryview) -> str:
    """Return the XXH3-128 digest, 32 hexadecimal digits.

    Raises:
        UnsupportedFeature: the package xxhash is not installed.
    """
    found: str = new_xxh3_128(data).hexdigest()
    return found


def new_xxh3_128(data: memoryview | bytes = b"") -> Any:
    """Return an XXH3-128 hasher. Raises UnsupportedFeature if the package xxhash is not installed."""
    try:
        import xxhash
    except ImportError as error:
        raise UnsupportedFeature(
            "the file has XXH3-128 digests, which need the package xxhash; run `pip install"
            " 'sparsedelta[interop]'`"
        ) from error
    return xxhash.xxh3_128(data)


def sha256(data: memoryview) -> str:
    """Return the SHA-256 digest, 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


DIGESTS: dict[str, Digest] = {
    "xxh3-128": xxh3_128, "blake3": blake3_hex, "adler32": adler32, "sha256": sha256,
}  # fmt: skip


def check_digest(name: str, found: str, expected: str) -> None:
    """Check the digest of a rebuilt tensor.

    Raises:
        Corrupt: it differs.
    """
    if found != expected:
        raise Corrupt(
            f"tensor {name!r} is rebuilt with digest {found[:12]}, but the delta states {expected[:12]}; the base"
            " is not the one that the delta was made from, or the delta is damaged",
            tensor=name,
            expected=expected,
            found=found,
        )
