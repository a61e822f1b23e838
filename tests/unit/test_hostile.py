"""What strangers and bad luck may bring to the core: bounded effort, and an error that says what is wrong."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from sparsedelta import strictjson
from sparsedelta.errors import LimitExceeded, SparseDeltaError
from sparsedelta.strictjson import parse_json

WITHIN_1_GB = """
import resource
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
"""


def run_within_1_gb(code: str) -> str:
    """Return what a program prints that may take 1 GiB of address space."""
    program = [sys.executable, "-c", WITHIN_1_GB + code]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def depth_of(raw: bytes) -> int:
    """Return how deep the brackets outside strings are nested, byte by byte."""
    depth = deepest = 0
    in_string, after_backslash = False, False
    for byte in raw:
        if after_backslash:
            after_backslash = False
        elif byte == ord("\\"):
            after_backslash = True
        elif byte == ord('"'):
            in_string = not in_string
        elif not in_string and byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif not in_string and byte in b"]}":
            depth -= 1
    return deepest


@pytest.mark.parametrize("block_bytes", [1, 2, 5, 1 << 20])
def test_depth_across_blocks(block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strictjson, "_BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(strictjson, "MAX_DEPTH", 2)
    draw = random.Random(block_bytes)
    pieces = [b"[", b"]", b"{", b"}", b'"', b'"', b'\\"', b"\\\\", b",", b"a"]
    n_deep = 0
    for _ in range(2000):
        raw = b"".join(draw.choices(pieces, k=draw.randrange(16)))
        found = ""
        try:
            parse_json(raw, "it")
        except SparseDeltaError as error:
            found = error.code
        deep = depth_of(raw) > 2
        assert (found == LimitExceeded.code) == deep, raw
        n_deep += deep
    assert n_deep > 50


@pytest.mark.parametrize(
    "text", ["quote + b'a' * n + quote", "quote + (escape + quote) * (n // 2)"]
)
def test_a_long_string_takes_little_memory(text: str) -> None:
    out = run_within_1_gb(f"""
from sparsedelta.errors import FormatError
from sparsedelta.strictjson import parse_json
n, quote, escape = 1 << 24, b'"', bytes([92])
try:
    parse_json({text}, "it")
except FormatError:
    pass
print("parsed or refused")
""")
    assert out == "parsed or refused\n"
