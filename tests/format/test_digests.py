"""Fingerprints, byte by byte as FORMAT §14 says, and independent of order."""

from __future__ import annotations

from blake3 import blake3

from sparsedelta.dtypes import DTYPES
from sparsedelta.format.digests import base_tensors, fingerprint
from sparsedelta.format.records import BaseTensor, Row, TensorSpec


def spec(dtype: str, shape: tuple[int, ...], digest: bytes = bytes(16)) -> TensorSpec:
    return TensorSpec(DTYPES[dtype], shape, digest)


def test_bytes_that_are_digested() -> None:
    digest_a, digest_b = bytes(range(16)), bytes(range(16, 32))
    tensors = [("é", spec("BF16", (2, 300), digest_b)), ("a", spec("U8", (), digest_a))]
    expected = (
        b"sparsedelta fingerprint 2\0"
        b"\x01\0\0\0a\x02U8\0\0\0\0" + digest_a + b"\x02\0\0\0\xc3\xa9\x04BF16\x02\0\0\0"
        b"\x02\0\0\0\0\0\0\0\x2c\x01\0\0\0\0\0\0" + digest_b
    )
    assert fingerprint(tensors) == blake3(expected).digest()
    assert fingerprint(reversed(tensors)) == blake3(expected).digest()


def test_no_tensors() -> None:
    assert fingerprint([]) == blake3(b"sparsedelta fingerprint 2\0").digest()


def test_tensors_of_one_name_count_each() -> None:
    one, other = ("a", spec("U8", (1,))), ("a", spec("U8", (1,), b"\1" * 16))
    found = {fingerprint(tensors) for tensors in ([one], [one, one], [one, other], [other])}
    assert len(found) == 4
    assert fingerprint([one, other]) == fingerprint([other, one])


def test_every_part_counts() -> None:
    others = [
        ("b", spec("U8", (4,))),
        ("a", spec("I8", (4,))),
        ("a", spec("U8", (2, 2))),
        ("a", spec("U8", (4,), bytes(15) + b"\1")),
    ]
    assert len({fingerprint([tensor]) for tensor in [("a", spec("U8", (4,))), *others]}) == 5


def test_a_base_tensor_of_several_rows_counts_once() -> None:
    base = BaseTensor("f", "w", spec("U8", (4,)))
    rows = [Row("f", name, base.spec, base, 4, ()) for name in "wv"]
    rows.append(Row("f", "new", base.spec, None, 0, ()))
    assert base_tensors(rows) == {("f", "w"): base.spec}
