"""Sequences of checkpoints that differ in every way, for the laws of stacking and inverting."""

from __future__ import annotations

import contextlib
import json
import random
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from helpers import Raw, noise, small_chunks, write, write_file, write_sharded
from hypothesis import strategies as st

import sparsedelta

DTYPES = ("BF16", "F32", "F8_E4M3", "I64", "F4", "BOOL")
NAMES = ("a", "b", "model.c", "sparsedelta:d")
_BLOCK_BYTES = 16
WIDTHS = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "I64": 8, "F4": 1, "BOOL": 1}


@dataclass(frozen=True)
class State:
    """A checkpoint: tensors in order, side files, empty folders, and how it is written.

    In the files every name begins with ``prefix``.
    """

    tensors: Mapping[str, Raw]
    files: Mapping[str, str]
    sharded: bool
    spaced: bool
    folders: tuple[str, ...] = ()
    prefix: str = ""

    def write(self, path: Path) -> Path:
        """Write it as a folder and return that."""
        path.mkdir()
        tensors = {self.prefix + name: tensor for name, tensor in self.tensors.items()}
        if self.sharded:
            names = list(tensors)
            half = -(-len(names) // 2)
            shards = [names[:half], names[half:]]
            write_sharded(path, [{n: tensors[n] for n in shard} for shard in shards])
        elif self.spaced:
            write_file(path / "model.safetensors", tensors, spell=lambda f: json.dumps(f).encode())
        else:
            write_file(path / "model.safetensors", tensors, {"format": "pt"})
        for name, text in self.files.items():
            write(path / name, text)
        for folder in self.folders:
            (path / folder).mkdir(parents=True)
        return path


def _changed(raw: Raw, draw: random.Random) -> Raw:
    """Return a tensor with some elements replaced by other bits, a few by very different ones."""
    width = WIDTHS[raw.dtype]
    data = bytearray(raw.data)
    for start in range(0, len(data), width):
        if draw.random() < 0.3:
            data[start] ^= draw.choice([1, 3])
        elif draw.random() < 0.1:
            data[start : start + width] = draw.randbytes(width)
    return raw.with_data(bytes(data))


def _resized(raw: Raw, n_rows: int, seed: object) -> Raw:
    """Return a tensor with rows cut or added."""
    shape = (n_rows, *raw.shape[1:])
    other = noise(raw.dtype, *shape, seed=seed)
    made = other.with_data((raw.data + other.data[len(raw.data) :])[: len(other.data)])
    return _with_zeros(made, random.Random(f"{seed}"))


def _with_zeros(raw: Raw, draw: random.Random) -> Raw:
    """Return a tensor some elements of which are zero bits, as those that a base has not."""
    width = WIDTHS[raw.dtype]
    data = bytearray(raw.data)
    for start in range(0, len(data), width):
        if draw.random() < 0.3:
            data[start : start + width] = bytes(width)
    return raw.with_data(bytes(data))


def _new_tensor(draw: random.Random) -> Raw:
    raw = noise(draw.choice(DTYPES), draw.choice([0, 1, 5, 9]), 4, seed=draw.random())
    return _with_zeros(raw, draw)


IN_PLACE = ("keep", "change", "change", "back")
STRUCTURAL = (*IN_PLACE, "grow", "shrink", "zeros", "retype", "drop", "reshape")


def _next_tensor(
    name: str, states: list[State], draw: random.Random, kinds: tuple[str, ...]
) -> Raw | None:
    raw = states[-1].tensors.get(name)
    earlier = [s.tensors[name] for s in states if name in s.tensors]
    if raw is None:
        return draw.choice([None, _new_tensor(draw), *earlier]) if "drop" in kinds else None
    kind = draw.choice(kinds)
    if kind == "change":
        return _changed(raw, draw)
    if kind == "back":
        return draw.choice(earlier)
    if kind == "grow":
        return _resized(_changed(raw, draw), raw.shape[0] + draw.choice([1, 4]), draw.random())
    if kind == "shrink":
        return _resized(_changed(raw, draw), raw.shape[0] // 2, 0)
    if kind == "zeros":
        return raw.with_data(bytes(len(raw.data)))
    if kind == "retype":
        return _new_tensor(draw)
    if kind == "reshape":
        return Raw(raw.dtype, raw.shape[::-1], raw.data) if raw.dtype != "F4" else raw
    return None if kind == "drop" else raw


def _next(states: list[State], draw: random.Random, kinds: tuple[str, ...]) -> State:
    found = {n: _next_tensor(n, states, draw, kinds) for n in NAMES}
    tensors = {name: raw for name, raw in found.items() if raw is not None}
    if "drop" not in kinds:
        return replace(states[-1], tensors=tensors)
    order = list(tensors)
    draw.shuffle(order)
    files = dict(states[-1].files)
    for path in ("config.json", "sub/x.txt"):
        choice = draw.choice(["keep", "new", "old", "drop"])
        if choice == "new":
            files[path] = f"{draw.random()}"
        elif choice == "old" and path in states[0].files:
            files[path] = states[0].files[path]
        elif choice == "drop":
            files.pop(path, None)
    return State(
        {name: tensors[name] for name in order},
        files,
        len(tensors) > 1 and draw.random() < 0.3,
        draw.random() < 0.3,
        ("empty",) if draw.random() < 0.3 else (),
        draw.choice(["", "", "module."]),
    )


def states(n_states: int, kinds: tuple[str, ...] = STRUCTURAL) -> st.SearchStrategy[list[State]]:
    """Return sequences of checkpoints, each made of the one before it."""

    def build(seed: int) -> list[State]:
        draw = random.Random(seed)
        first = State({n: _new_tensor(draw) for n in NAMES}, {"config.json": "{}"}, False, False)
        result = [first]
        while len(result) < n_states:
            result.append(_next(result, draw, kinds))
        return result

    return st.integers(0, 2**32).map(build)


values = st.sampled_from(["ulp", "ulp", "target"])
SPAN = 8
spans = st.sampled_from([SPAN, SPAN, 3, 13])  # of the chunks that diff makes


@dataclass(frozen=True)
class Place:
    """A folder to write checkpoints and deltas in."""

    path: Path
    context: contextlib.ExitStack

    def diff(self, *args: Any, span: int = SPAN, **options: Any) -> sparsedelta.Delta:
        """Return ``sparsedelta.diff`` in chunks of ``span`` elements, closed at the end."""
        with pytest.MonkeyPatch.context() as patch:
            small_chunks(patch, span, _BLOCK_BYTES)
            return self.context.enter_context(sparsedelta.diff(*args, **options))

    def stack(self, *args: Any, **options: Any) -> sparsedelta.Delta:
        """Return ``sparsedelta.stack``, closed at the end."""
        return self.context.enter_context(sparsedelta.stack(*args, **options))

    def invert(self, *args: Any, **options: Any) -> sparsedelta.Delta:
        """Return ``sparsedelta.invert``, closed at the end."""
        return self.context.enter_context(sparsedelta.invert(*args, **options))

    def checkpoints(self, states: list[State]) -> list[Path]:
        """Write checkpoints and return their folders."""
        return [state.write(self.path / f"s{number}") for number, state in enumerate(states)]

    def saved(self, delta: sparsedelta.Delta, name: str) -> sparsedelta.Delta:
        """Save a delta and return it as it is loaded again, checked whole."""
        path = self.path / f"{name}.sd"
        delta.save(path)
        sparsedelta.verify(path)
        return self.context.enter_context(sparsedelta.load(path))

    def bytes_of(self, delta: sparsedelta.Delta) -> bytes:
        """Return the file that a delta is saved as."""
        path = self.path / "bytes.sd"
        delta.save(path, overwrite=True)
        return path.read_bytes()


@contextlib.contextmanager
def place(n_elements: int = SPAN) -> Iterator[Place]:
    """Yield a folder, in tiny chunks."""
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory() as folder,
        contextlib.ExitStack() as context,
    ):
        for name in ("stack", "invert", "merge", "DeltaBank"):
            getattr(sparsedelta, name)  # imported before sizes are changed, so not with these
        small_chunks(patch, n_elements, _BLOCK_BYTES)
        yield Place(Path(folder), context)
