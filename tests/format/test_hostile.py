"""What strangers and bad luck may bring to the core: bounded effort, and an error that says what is wrong."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import noise, write_file
from vector_source.samples import plain
from vector_source.writer import Draft, assemble

import sparsedelta
from sparsedelta.errors import FormatError, LimitExceeded, SparseDeltaError
from sparsedelta.format import strict_json
from sparsedelta.format.strict_json import parse_json

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
    monkeypatch.setattr(strict_json, "_BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(strict_json, "MAX_DEPTH", 2)
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
from sparsedelta.format.strict_json import parse_json
n, quote, escape = 1 << 24, b'"', bytes([92])
try:
    parse_json({text}, "it")
except FormatError:
    pass
print("parsed or refused")
""")
    assert out == "parsed or refused\n"


def member(draft: Draft, **hooks: Any) -> bytes:
    draft.manifest["x" * 100_000] = 1
    return assemble(draft, **hooks)


def encoding(draft: Draft, **hooks: Any) -> bytes:
    draft.manifest["tensors"][0]["delta"]["values"] = "x" * 100_000
    return assemble(draft, **hooks)


def key_twice(draft: Draft, **hooks: Any) -> bytes:
    key = b',"' + b"x" * 100_000 + b'":1'
    return assemble(draft, text=lambda text: text[:-1] + key + key + b"}", **hooks)


def metadata(draft: Draft, **hooks: Any) -> bytes:
    def more(header: dict[str, Any]) -> dict[str, Any]:
        return header | {"__metadata__": header["__metadata__"] | {"x" * 100_000: "1"}}

    return assemble(draft, header=more, **hooks)


@pytest.mark.parametrize("alter", [member, encoding, key_twice, metadata])
def test_messages_quote_little_of_a_long_text(
    alter: Callable[[Draft], bytes], tmp_path: Path
) -> None:
    path = tmp_path / "delta.sd"
    path.write_bytes(alter(plain()))
    with pytest.raises(FormatError) as caught:
        sparsedelta.load(path)
    assert "xxx" in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 500


def test_pipes_and_folders_are_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    file = write_file(tmp_path / "w.safetensors", {"w": noise("U8", 4)})
    with pytest.raises(OSError, match=r"Not a regular file.*pipe"):
        sparsedelta.load(pipe)
    with pytest.raises(OSError, match=r"Not a regular file.*pipe"):
        sparsedelta.diff(pipe, file)
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        sparsedelta.load(tmp_path)


def test_closed_deltas_say_so(tmp_path: Path) -> None:
    file = write_file(tmp_path / "w.safetensors", {"w": noise("U8", 4)})
    other = write_file(tmp_path / "v.safetensors", {"w": noise("U8", 4).changed(2)})
    made = sparsedelta.diff(file, other)
    made.save(tmp_path / "delta.sd")
    loaded = sparsedelta.load(tmp_path / "delta.sd")
    for delta in (made, loaded):
        delta.close()
        for use in (delta.save, lambda out, delta=delta: sparsedelta.apply(file, delta, out)):
            with pytest.raises(ValueError, match="closed"):
                use(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["delta.sd", "v.safetensors", "w.safetensors"]


def test_base_id_that_is_not_utf8(tmp_path: Path) -> None:
    file = write_file(tmp_path / "w.safetensors", {"w": noise("U8", 4)})
    with pytest.raises(ValueError, match="base_id cannot be recorded"):
        sparsedelta.diff(file, file, base_id=os.fsdecode(b"org/\xff"))
