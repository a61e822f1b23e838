"""The worked example of FORMAT.md is the vector `example`, byte for byte, and is up to date."""

from __future__ import annotations

import re

import make_example
from blake3 import blake3
from vectors import SPEC, VECTORS

TEXT = (SPEC / "FORMAT.md").read_text(encoding="utf-8")
SECTION = TEXT[TEXT.index(make_example.BEGIN) : TEXT.index(make_example.END)]


def test_section_is_up_to_date() -> None:
    assert make_example.BEGIN + make_example.section() == SECTION


def test_listing_is_the_whole_delta() -> None:
    listing = SECTION.split("```")[1]
    delta = b""
    for offset, text, digits in re.findall(
        r"^ *(\d+)  (?:'(.*)'|([0-9a-f ]+))$", listing, re.MULTILINE
    ):
        assert int(offset) == len(delta)
        delta += text.encode("ascii") if text else bytes.fromhex(digits)
    assert delta == (VECTORS / "valid/example/delta.sd").read_bytes()


def digest_after(comment: str) -> str:
    """Return the digest in the listing that stands behind a comment, as hex."""
    found = re.search(rf"# {comment}[^\n]*\n *\d+  ([0-9a-f ]+)\n", SECTION)
    assert found is not None, comment
    return found[1].replace(" ", "")


def test_digests_are_of_the_bytes_told() -> None:
    base, target = (
        (VECTORS / f"valid/example/{role}.safetensors").read_bytes() for role in ("base", "target")
    )
    delta = (VECTORS / "valid/example/delta.sd").read_bytes()
    told = [bytes.fromhex(one) for one in re.findall(r"BLAKE3\(`([0-9a-f ]+)`\)\[:8\]", SECTION)]
    for comment, content in (
        ("digest of the header", target[8:-600]),
        ("base digest of w", base[-600:]),
        ("target digest of w", target[-600:]),
        ("digest of the chunk", delta[-13:]),
        ("touched digest, before", told[0]),
        ("touched digest, after", told[1]),
    ):
        digest = digest_after(comment)
        assert digest == blake3(content).hexdigest()[: len(digest)], comment
    assert len(told) == 2
    start = 8 + int.from_bytes(delta[:8], "little")
    assert f'"{blake3(delta[start:-13]).hexdigest()}"'.encode() in delta[8:start]


def test_arithmetic_is_true() -> None:
    rows = re.findall(
        r"^\| (\d+) \| `(\w+)` \| `(\w+)` \| `(\w+)` \| `(\w+)` \| (\S+) \|.*`(\w+)`",
        SECTION,
        re.MULTILINE,
    )
    files = [
        (VECTORS / f"valid/example/{role}.safetensors").read_bytes()[-600:]
        for role in ("base", "target")
    ]
    assert [int(row[0]) for row in rows] == [
        p for p in range(300) if files[0][2 * p :][:2] != files[1][2 * p :][:2]
    ]
    for position, *hexes, moved, code in rows:
        b, t, from_b, from_t = (int(x, 16) for x in hexes)
        at = 2 * int(position)
        assert [int.from_bytes(data[at : at + 2], "little") for data in files] == [b, t]
        assert from_t - from_b == int(moved.replace("−", "-"))
        d = from_t - from_b
        assert int(code, 16) == (2 * d if d >= 0 else -2 * d - 1)
