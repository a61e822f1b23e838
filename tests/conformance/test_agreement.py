"""Decoders agree on deltas of another writer: any coding, any borders, any base tensor; and on any checkpoint."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from decoders import DECODERS
from helpers import write
from hypothesis import given
from hypothesis import strategies as st
from strategies import Plan, pairs, relaxed
from vector_source.checkpoints import Checkpoint, Tensor, WeightFile
from vector_source.writer import Coding, Place, assemble, code, draft
from vectors import tree

import sparsedelta
from sparsedelta.errors import CheckpointError

WIDTHS = {"U8": 1, "BF16": 2, "F16": 2, "F32": 4, "I64": 8, "F4": 1}
NAMES = ("w", "v", "model.w")
FILES = ("a.safetensors", "model.safetensors")


def of_elements(dtype: str, elements: Sequence[int]) -> Tensor:
    """Return a tensor with these bits, of one dimension."""
    width = WIDTHS[dtype]
    data = b"".join(one.to_bytes(width, "little") for one in elements)
    return Tensor(dtype, (len(elements) * (2 if dtype == "F4" else 1),), data)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Draw a tensor of few elements."""
    dtype = draw(st.sampled_from(sorted(WIDTHS)))
    top = (1 << 8 * WIDTHS[dtype]) - 1
    element = st.integers(0, 9) | st.integers(0, top)
    return of_elements(dtype, draw(st.lists(element, max_size=24)))


def edited(draw: st.DrawFn, one: Tensor) -> Tensor:
    """Return a tensor with some elements changed, a few of them by much, perhaps longer or shorter."""
    elements = list(one.elements())
    if draw(st.integers(0, 3)) == 0:
        elements = elements[: draw(st.integers(0, len(elements)))] + draw(
            st.lists(st.integers(0, 255), max_size=5)
        )
    top = (1 << 8 * one.width) - 1
    for place in range(len(elements)):
        if draw(st.integers(0, 2)) == 0:
            step = draw(st.sampled_from([1, 1, 2, 3, top // 2]))
            elements[place] = (elements[place] + step) & top
    return of_elements(one.dtype, elements)


@st.composite
def codings(draw: st.DrawFn, before: Sequence[int], after: Sequence[int], element: str) -> Coding:
    """Draw how a row is coded, each chunk for itself."""
    n = len(after)
    cuts = sorted(draw(st.sets(st.integers(0, n), max_size=4)) | {0, n})
    parts = []
    for begin, end in itertools.pairwise(cuts):
        changed = [p for p in range(begin, end) if before[p] != after[p]]
        if not changed:
            continue
        # A chunk need not cover more than what changes.
        begin = draw(st.integers(begin, changed[0]))
        end = draw(st.integers(changed[-1] + 1, end))
        values = draw(st.sampled_from(["ulp", "target"]))
        codes = [code(before[p], after[p], values, element) for p in changed]
        packings = ["planes"]
        if max(codes) < 1 << 32:
            packings += ["scaled"] + (["steps"] if min(codes) and max(codes) < 1000 else [])
        thresholds = sorted(draw(st.sets(st.integers(1, 255), max_size=3)))
        index, packing = (
            draw(st.sampled_from(["gaps", "bitmap", "rice"])),
            draw(st.sampled_from(packings)),
        )
        one = Coding(
            index,
            values,
            packing=packing,
            thresholds=thresholds if "rice" in index or packing == "steps" else (),
            k=draw(st.integers(0, 3)),
        )
        parts.append((begin, end - begin, one))
    return Coding(chunks=parts)


@st.composite
def deltas(draw: st.DrawFn) -> tuple[Checkpoint, Checkpoint, bytes]:
    """Draw a base, a target and the bytes of their delta."""
    base = Checkpoint(
        [
            WeightFile(file, draw(st.dictionaries(st.sampled_from(NAMES), tensors(), max_size=3)))
            for file in FILES
        ]
    )
    places = sorted(base.places())
    made: dict[Place, Tensor] = {}
    sources: dict[Place, Place | None] = {}
    how: dict[str, Coding] = {}
    for number in range(draw(st.integers(1, 4))):
        place = draw(st.sampled_from(FILES)), f"t{number}"
        source = draw(st.sampled_from([None, *places]))
        old = base.places()[source] if source else None
        new = edited(draw, old) if old else draw(tensors())
        kept = draw(st.integers(0, min(len(old.elements()), len(new.elements())))) if old else 0
        if draw(st.booleans()) and old:
            kept = min(len(old.elements()), len(new.elements()))
        before = [*(old.elements()[:kept] if old else ()), *[0] * (len(new.elements()) - kept)]
        coding = draw(codings(before, list(new.elements()), new.element))
        how[place[1]] = replace(coding, keep=kept if old else None)
    files = [
        WeightFile(file, {name: one for (there, name), one in made.items() if there == file})
        for file in FILES
    ]
    target = Checkpoint(files)
    known = draw(st.booleans())
    return base, target, assemble(draft(base, target, how, sources=sources, known=known))


def put(checkpoint: Checkpoint, path: Path) -> Path:
    for name, content in checkpoint.files().items():
        write(path / name, content)
    return path


@relaxed(120)
@given(drawn=deltas())
def test_decoders_give_the_target(
    drawn: tuple[Checkpoint, Checkpoint, bytes], tmp_path: Path
) -> None:
    base, target, delta = drawn
    for name in ("base", "out"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
    root, path = put(base, tmp_path / "base"), tmp_path / "delta.sd"
    path.write_bytes(delta)
    for decoder in DECODERS:
        decoder.apply(root, path, tmp_path / "out")
        assert tree(tmp_path / "out") == target.files(), decoder.name
        shutil.rmtree(tmp_path / "out")
    put(target, tmp_path / "out")
    assert sparsedelta.verify(path, base=root, target=tmp_path / "out").target_checked


@relaxed(50)
@given(pair=pairs(), data=st.data())
def test_decoders_say_the_same_of_other_checkpoints(
    pair: tuple[Plan, Plan], data: st.DataObject
) -> None:
    """The target, a base with one bit changed, without a file, or with some of the target's files."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        base, target = pair[0].write(root / "base"), pair[1].write(root / "target")
        with sparsedelta.diff(base, target) as delta:
            delta.save(root / "delta.sd")
        kind = data.draw(st.sampled_from(["target", "flip", "drop", "mix"]))
        there = target if kind == "target" else base
        files = [path for path in (there, *sorted(there.rglob("*"))) if path.is_file()]
        one = data.draw(st.sampled_from(files))
        if kind == "flip":
            flip_content(data, one)
        elif kind == "drop" and len(files) > 1:
            one.unlink()
        elif kind == "mix" and target.is_dir() and base.is_dir():
            for path in files:
                other = target / path.relative_to(base)
                if other.is_file() and data.draw(st.booleans()):
                    shutil.copy(other, path)
        codes = {
            decoder.name: decoder.apply_code(there, root / "delta.sd", root / decoder.name)
            for decoder in DECODERS
        }
        # The package refuses a checkpoint that contradicts itself; the reference decoder does not look.
        assert codes["package"] in (codes["reference"], CheckpointError.code)
        if set(codes.values()) == {"accepted"}:
            assert tree(root / "package") == tree(root / "reference")


def flip_content(data: st.DataObject, path: Path) -> None:
    """Change one bit of a file, not of the header of a weight file."""
    content = bytearray(path.read_bytes())
    first = 0
    if path.suffix == ".safetensors" or path.name == "base":
        first = 8 + int.from_bytes(content[:8], "little")
    if first < len(content):
        content[data.draw(st.integers(first, len(content) - 1))] ^= 1
        path.write_bytes(content)
