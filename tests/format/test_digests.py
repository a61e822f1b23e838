"""Fingerprints, byte by byte as FORMAT §9 says, and independent of order."""

from __future__ import annotations

from blake3 import blake3

from sparsedelta.format.digests import fingerprint


def test_bytes_that_are_digested() -> None:
    digest_a, digest_b = bytes(range(32)), bytes(range(32, 64))
    tensors = [("é", "BF16", (2, 300), digest_b), ("a", "U8", (), digest_a)]
    expected = (
        b"sparsedelta fingerprint 1\0"
        b"\x01\0\0\0a\x02U8\0\0\0\0" + digest_a + b"\x02\0\0\0\xc3\xa9\x04BF16\x02\0\0\0"
        b"\x02\0\0\0\0\0\0\0\x2c\x01\0\0\0\0\0\0" + digest_b
    )
    assert fingerprint(tensors) == blake3(expected).digest()
    assert fingerprint(reversed(tensors)) == blake3(expected).digest()


def test_no_tensors() -> None:
    assert fingerprint([]) == blake3(b"sparsedelta fingerprint 1\0").digest()


def test_names_are_sorted_by_their_bytes() -> None:
    # UTF-16 would put the first before the second.
    names = ["\U0001f642", "\uffee"]
    tensors = [(name, "U8", (1,), bytes(32)) for name in names]
    one_by_one = b"".join(
        len(name.encode()).to_bytes(4, "little")
        + name.encode()
        + b"\x02U8\x01\0\0\0\x01\0\0\0\0\0\0\0"
        + bytes(32)
        for name in reversed(names)
    )
    expected = blake3(b"sparsedelta fingerprint 1\0" + one_by_one).digest()
    assert fingerprint(tensors) == expected


def test_every_part_counts() -> None:
    one = ("a", "U8", (4,), bytes(32))
    others = [
        ("b", "U8", (4,), bytes(32)),
        ("a", "I8", (4,), bytes(32)),
        ("a", "U8", (2, 2), bytes(32)),
        ("a", "U8", (4,), bytes(31) + b"\1"),
    ]
    assert len({fingerprint([tensor]) for tensor in [one, *others]}) == 5
