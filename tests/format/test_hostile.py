"""What strangers and bad luck may bring to the core: bounded effort, and an error that says what is wrong."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import noise, write_file
from vector_source.checkpoints import Checkpoint, WeightFile, tensor
from vector_source.writer import Draft, assemble, draft

import sparsedelta
from sparsedelta.errors import BadMagic, FormatError, SparseDeltaError
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
    for _ in range(600):
        raw = b"".join(draw.choices(pieces, k=draw.randrange(16)))
        found = ""
        try:
            parse_json(raw, "it")
        except SparseDeltaError as error:
            found = "deep" if "deeper than 2" in str(error) else error.code
        deep = depth_of(raw) > 2
        assert found == "deep" if deep else found != "deep", raw
        n_deep += deep
    assert n_deep > 15


def test_a_long_string_takes_little_memory() -> None:
    out = run_within_1_gb("""
from sparsedelta.errors import FormatError
from sparsedelta.format.strict_json import parse_json
n, quote, escape = 1 << 24, b'"', bytes([92])
for text in (quote + b"a" * n + quote, quote + (escape + quote) * (n // 2)):
    try:
        parse_json(text, "it")
    except FormatError:
        pass
print("parsed or refused")
""")
    assert out == "parsed or refused\n"


def small() -> Draft:
    """Return a small delta."""
    old, new = (
        Checkpoint([WeightFile("model.safetensors", {"w": tensor("BF16", bits)})])
        for bits in ([1, 2, 3, 4], [1, 2, 3, 5])
    )
    return draft(old, new)


LONG = "x" * 100_000
Alter = Callable[[Draft], object]


@pytest.mark.parametrize(
    "alter",
    [
        lambda d: d.structure.update(requires=[LONG]),
        lambda d: d.structure["codings"][0].__setitem__(0, LONG),
        lambda d: d.structure["layouts"][0].__setitem__(0, LONG),
        lambda d: d.structure["layouts"].append(["x" * 64, 0, "i1", []]),
        lambda d: d.structure["layouts"].append(["x" * 64, 8, "u1", []]),
        lambda d: d.structure["layouts"].append(["x" * 64, 8, LONG, []]),
        lambda d: d.structure["layouts"].append(["x" * 64, 4, "i1", [1]]),
        lambda d: d.structure["tensors"].update(names=[LONG]),
        lambda d: d.structure["target"].update(kind=LONG),
        lambda d: d.structure["target"]["weight_files"][0].__setitem__(0, LONG),
        lambda d: d.structure["target"]["weight_files"][0].__setitem__(0, f"a/../{LONG}"),
        lambda d: d.structure["target"]["weight_files"][0].__setitem__(2, [LONG]),
        lambda d: d.structure["target"]["weight_files"][0].__setitem__(
            2, ["canonical", [[LONG, ""], [LONG, ""]]]
        ),
        lambda d: d.structure["base"].update(files=[LONG]),
        lambda d: setattr(d, "notes", f'{{"{LONG}":1,"{LONG}":1}}'.encode()),
    ],
)
def test_messages_quote_little_of_a_long_text(alter: Alter, tmp_path: Path) -> None:
    changed = small()
    alter(changed)
    path = tmp_path / "delta.sd"
    path.write_bytes(assemble(changed, pack=bytes))
    with pytest.raises(FormatError) as caught:
        sparsedelta.load(path)
    assert "xxx" in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 500


@pytest.mark.parametrize(
    "alter",
    [
        lambda d: d.structure.update({LONG: 1}),
        lambda d: d.structure.update(base=LONG),
        lambda d: d.structure["base"].update(files=[[LONG]]),
        lambda d: d.structure["tensors"].update(names=[1] * 100_000),
        lambda d: d.structure["chunks"].update(raw=[-1] * 100_000),
    ],
)
def test_messages_without_what_is_wrong_are_short_too(alter: Alter, tmp_path: Path) -> None:
    changed = small()
    alter(changed)
    (tmp_path / "delta.sd").write_bytes(assemble(changed, pack=bytes))
    with pytest.raises(FormatError) as caught:
        sparsedelta.load(tmp_path / "delta.sd")
    assert len(str(caught.value)) < 300


def test_pipes_and_folders_are_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    file = write_file(tmp_path / "w.safetensors", {"w": noise("U8", 4)})
    with pytest.raises(OSError, match=r"Not a regular file.*pipe"):
        sparsedelta.load(pipe)
    with pytest.raises(OSError, match=r"Not a regular file.*pipe"):
        sparsedelta.diff(pipe, file)
    with pytest.raises(BadMagic, match=f"'{tmp_path}' is a folder with a model, not a delta"):
        sparsedelta.load(tmp_path)


def test_a_model_or_a_folder_in_place_of_a_delta(tmp_path: Path) -> None:
    file = write_file(tmp_path / "model" / "w.safetensors", {"w": noise("F32", 400)})
    model = file.parent
    (tmp_path / "empty").mkdir()
    deltas = tmp_path / "deltas"
    deltas.mkdir()
    with sparsedelta.diff(file, file) as delta:
        delta.save(deltas / "d.sd")
    for path, reason in (
        (model, "is a folder with a model, not a delta"),
        (file, "is a model, not a delta"),
        (tmp_path / "empty", "is a folder, not a delta"),
        (deltas, f"is a folder; give the delta in it, such as '{deltas}/d.sd'"),
    ):
        for use in (
            sparsedelta.load,
            sparsedelta.invert,
            sparsedelta.inspect,
            lambda path: sparsedelta.merge(model, path),
            lambda path: sparsedelta.push(path, "me/model"),
        ):
            with pytest.raises(BadMagic, match=re.escape(f"'{path}' {reason}")):
                use(path)
    for path in (model, file):
        with pytest.raises(BadMagic, match="if this is the base, give it before the delta"):
            sparsedelta.load_model(path, base=deltas / "d.sd")
    assert len(list(deltas.iterdir())) == 1


def test_a_list_of_deltas_is_refused_with_its_type(tmp_path: Path) -> None:
    stack: Any = sparsedelta.stack
    for use in (stack, lambda given: sparsedelta.merge(tmp_path, given)):
        with pytest.raises(TypeError, match=r"a delta is of type list.*each as an argument"):
            use([tmp_path / "a.sd", tmp_path / "b.sd"])


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
