"""Hypothesis strategies: random small checkpoints of any dtype, and edits that people make to them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers import BITS, UNKNOWN_BITS, Raw, compact, n_bytes, write, write_file, write_sharded
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase

IS_DEEP = "SPARSEDELTA_DEEP" in os.environ  # set by `pytest --deep`
_TIMES = 20
_FOUND = Path(__file__).parents[1] / ".hypothesis" / "examples"


def relaxed(n_examples: int) -> settings:
    """Return settings for property tests: the same examples in every run, without a deadline.

    With ``pytest --deep`` there are 20 times as many, other ones in every run. Those that fail are kept and are
    tried first in the next run.
    """
    return settings(
        max_examples=n_examples * (_TIMES if IS_DEEP else 1),
        deadline=None,
        derandomize=not IS_DEEP,
        database=DirectoryBasedExampleDatabase(_FOUND) if IS_DEEP else None,
        print_blob=IS_DEEP,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


dtypes = st.sampled_from(sorted(BITS) + sorted(UNKNOWN_BITS))
names = st.text(max_size=6).filter(lambda name: name != "__metadata__") | st.sampled_from(
    ["w", "v", "layer.0.weight", "model.layer.0.weight", "manifest", "m:w", "a/b"]
)
patterns = st.sampled_from([b"\0", b"\xff", b"\x80", b"\0\x80", b"\x80\x7f", b"\xc1\x7f", b"\1"])


def is_below_a_byte(dtype: str) -> bool:
    """Return whether a value of this dtype takes less than a byte."""
    return (BITS | UNKNOWN_BITS)[dtype] < 8


@st.composite
def shapes(draw: st.DrawFn, dtype: str) -> tuple[int, ...]:
    """Draw a shape whose elements fill whole bytes."""
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=3)))
    return (*shape, 4 * draw(st.integers(0, 3))) if is_below_a_byte(dtype) else shape


@st.composite
def contents(draw: st.DrawFn, size: int) -> bytes:
    """Draw the bytes of a tensor: random, or made of few special patterns."""
    if draw(st.booleans()):
        return draw(st.binary(min_size=size, max_size=size))
    return (draw(patterns) * size)[:size]


@st.composite
def raws(draw: st.DrawFn) -> Raw:
    """Draw a tensor."""
    dtype = draw(dtypes)
    shape = draw(shapes(dtype))
    return Raw(dtype, shape, draw(contents(n_bytes(dtype, shape))))


def changed(draw: st.DrawFn, tensor: Raw) -> Raw:
    """Return the tensor with some bytes replaced."""
    data = bytearray(tensor.data)
    if data:
        for position in draw(st.lists(st.integers(0, len(data) - 1), max_size=5)):
            data[position] = draw(st.integers(0, 255))
    return tensor.with_data(bytes(data))


def resized(draw: st.DrawFn, tensor: Raw) -> Raw:
    """Return the tensor with another first dimension and the same leading bytes."""
    if len(tensor.shape) < 2:
        return changed(draw, tensor)
    shape = (draw(st.integers(0, 8)), *tensor.shape[1:])
    if is_below_a_byte(tensor.dtype) and shape[-1] % 4:
        return tensor
    data = tensor.data + draw(contents(n_bytes(tensor.dtype, shape)))
    return Raw(tensor.dtype, shape, data[: n_bytes(tensor.dtype, shape)])


def reshaped(draw: st.DrawFn, tensor: Raw) -> Raw:
    """Return the tensor with a reversed or flat shape, or with a leading dimension of 1."""
    flat = (math.prod(tensor.shape),)
    shape = draw(st.sampled_from([tuple(reversed(tensor.shape)), flat, (1, *tensor.shape)]))
    return Raw(tensor.dtype, shape, tensor.data)


def replaced(draw: st.DrawFn, tensor: Raw) -> Raw:
    """Return another tensor."""
    return draw(raws())


EDITS: list[Callable[[st.DrawFn, Raw], Raw]] = [
    changed,
    changed,
    changed,
    resized,
    reshaped,
    replaced,
]


@st.composite
def edited(draw: st.DrawFn, tensors: dict[str, Raw]) -> dict[str, Raw]:
    """Draw an edited list of tensors: some kept, changed, removed or added, in another order."""
    result = {}
    for name, tensor in tensors.items():
        fate = draw(st.integers(0, 9))
        if fate:
            result[name] = tensor if fate < 3 else draw(st.sampled_from(EDITS))(draw, tensor)
    result |= draw(st.dictionaries(names, raws(), max_size=2))
    order = draw(st.permutations(list(result))) if draw(st.booleans()) else list(result)
    return {name: result[name] for name in order}


def moved(draw: st.DrawFn, files: dict[str, dict[str, Raw]]) -> dict[str, dict[str, Raw]]:
    """Return files in which some tensors are renamed, moved to another file, or duplicated."""
    fate = draw(st.sampled_from(["prefix", "no prefix", "rename", "move", "copy", "as they are"]))
    files = {stem: dict(tensors) for stem, tensors in files.items()}
    stem, other = draw(st.tuples(*[st.sampled_from(sorted(files))] * 2))
    if fate == "prefix":
        files[stem] = {f"model.{name}": tensor for name, tensor in files[stem].items()}
    elif fate == "no prefix":
        files[stem] = {name.removeprefix("model."): t for name, t in files[stem].items()}
    elif files[stem] and fate != "as they are":
        name = draw(st.sampled_from(sorted(files[stem])))
        tensor = files[stem][name] if fate == "copy" else files[stem].pop(name)
        files[other][name if fate == "move" else draw(names)] = tensor
    return files


def spelled(
    indent: int | None, spaces: int, *, backwards: bool
) -> Callable[[dict[str, Any]], bytes]:
    """Return a function that formats a header in a drawn way."""

    def spell(fields: dict[str, Any]) -> bytes:
        if backwards:
            fields = dict(reversed(fields.items()))
        return json.dumps(fields, indent=indent).encode() + b" " * spaces

    return spell


spellings = st.just(compact) | st.builds(
    spelled, st.sampled_from([None, 0, 2]), st.integers(0, 9), backwards=st.booleans()
)
metadata = st.none() | st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2)

paths = st.lists(
    st.text("abé.-", min_size=1, max_size=3).filter(lambda part: not part.endswith(".")),
    min_size=1,
    max_size=3,
).map("/".join)


@dataclass(frozen=True)
class Plan:
    """A checkpoint to be written.

    Attributes:
        files: the tensors of each weight file by its stem; a file may be written as shards.
        write: a function that writes the files below a path and returns the path of the checkpoint.
    """

    files: dict[str, dict[str, Raw]]
    write: Callable[[Path], Path]


@st.composite
def plans(draw: st.DrawFn, weights: dict[str, dict[str, Raw]]) -> Plan:
    """Draw which weight files are written as shards, and which other files there are."""
    spell, meta = draw(spellings), draw(metadata)
    if len(weights) == 1 and draw(st.booleans()):
        (tensors,) = weights.values()
        return Plan(weights, lambda path: write_file(path, tensors, meta, spell=spell))
    parts = {
        stem: draw(st.lists(st.integers(0, 2), min_size=len(tensors), max_size=len(tensors)))
        if draw(st.booleans())
        else None
        for stem, tensors in weights.items()
    }
    files = draw(st.dictionaries(paths, st.binary(max_size=20), max_size=3))
    folders = draw(st.lists(paths, max_size=2))

    def write_plan(root: Path) -> Path:
        root.mkdir()
        for stem, tensors in weights.items():
            numbers = parts[stem]
            if numbers is None:
                write_file(root / f"{stem}.safetensors", tensors, meta, spell=spell)
            else:
                shards: list[dict[str, Raw]] = [{}, {}, {}]
                for number, (name, tensor) in zip(numbers, tensors.items(), strict=True):
                    shards[number][name] = tensor
                write_sharded(root, [shard for shard in shards if shard] or [{}], stem=stem)
        for path, content in files.items():
            if free(root, path):
                write(root / path, content)
        for path in folders:
            if free(root, path):
                (root / path).mkdir(parents=True)
        return root

    return Plan(weights, write_plan)


def free(root: Path, path: str) -> bool:
    """Return whether a file or folder can be created at a path."""
    place = root / path
    parents = [p for p in place.parents if p.is_relative_to(root)]
    return not os.path.lexists(place) and all(p.is_dir() or not p.exists() for p in parents)


STEMS = [["model"], ["model"], ["model", "m"], ["a", "s/m"], ["model", "model.fp16"], ["x"]]


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Plan, Plan]:
    """Draw a base and a target that was made from it."""
    old: dict[str, dict[str, Raw]] = {}
    for stem in draw(st.sampled_from(STEMS)):
        old[stem] = draw(st.dictionaries(names, raws(), max_size=4))
    new = moved(draw, {stem: draw(edited(tensors)) for stem, tensors in old.items()})
    if len(new) > 1 and not draw(st.integers(0, 3)):
        new.popitem()
    return draw(plans(old)), draw(plans(new))
