"""The deltas that the invalid vectors alter, and ways to alter them; digests follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vector_source.valid import WEIGHTS, folder, noise, nudged
from vector_source.writer import Checkpoint, Coding, Draft, WeightFile, assemble, draft, tensor

CONFIG = "sparsedelta:file/config.json"
STORED = "part.safetensors"
HEADER = "sparsedelta:header/" + STORED


@dataclass(frozen=True)
class Invalid:
    """An invalid vector. With `on_apply` it is refused only where it meets its base."""

    name: str
    why: str
    breaks: str
    code: str
    delta: bytes
    on_apply: bool = False


def sample_base() -> Checkpoint:
    """Return the base of all invalid vectors."""
    tensors = {"w": noise("BF16", 8, 21), "same": noise("I32", 3, 23)}
    tensors |= {"gone": noise("U8", 4, 24), "lost": noise("U8", 4, 25)}
    side = {"kept.txt": b"kept\n", "config.json": b"{}\n"}
    return folder(WeightFile(WEIGHTS, tensors), side=side)


def sample(changed: Coding = Coding()) -> Draft:  # noqa: B008 - frozen
    """Return a delta with something of everything; its one changed tensor is coded as told."""
    base = sample_base()
    old = base.tensors()
    tensors = {"w": nudged(old["w"], (2, 3, 6))}
    part = WeightFile(STORED, {"same": old["same"], "new": tensor("F32", [0, 7, 9], (3, 1))})
    part.header = part.canonical()
    target = folder(WeightFile(WEIGHTS, tensors, {"format": "pt"}), part)
    target.side_files = {"config.json": b'{"a": 1}\n', "kept.txt": b"kept\n"}
    target.empty_folders = ["logs", "tmp"]
    return draft(base, target, {"new": Coding("bitmap"), "w": changed})


def with_header() -> Draft:
    """Return a small delta with a stored header, of two tensors."""
    tensors = {"same": noise("I32", 3, 23), "new": tensor("F32", [0, 7, 9], (3, 1))}
    part = WeightFile(STORED, tensors)
    part.header = part.canonical()
    return draft(folder(WeightFile(STORED, {"same": tensors["same"]})), folder(part))


def plain() -> Draft:
    """Return a smaller delta, for vectors that need no more: one tensor changed, one removed."""
    old = {"w": noise("BF16", 4, 21), "gone": noise("U8", 4, 24)}
    target = folder(WeightFile(WEIGHTS, {"w": nudged(old["w"], (2,))}))
    return draft(folder(WeightFile(WEIGHTS, old)), target)


def with_side_file(path: str = "config.json", content: bytes = b'{"a": 1}\n') -> Draft:
    """Return a small delta that carries a side file and changes nothing."""
    one = folder(WeightFile(WEIGHTS, {}))
    return draft(one, folder(WeightFile(WEIGHTS, {}), side={path: content}))


def at(value: Any, path: str) -> tuple[Any, Any]:
    """Return the container and the key of a dotted path within nested JSON."""
    steps: list[str | int] = [int(s) if s.lstrip("-").isdigit() else s for s in path.split(".")]
    for step in steps[:-1]:
        value = value[step]
    return value, steps[-1]


def with_manifest(edits: dict[str, Any], drop: str = "", of: Callable[[], Draft] = sample) -> bytes:
    """Return a delta with members of its manifest set, by dotted path, and one left out."""
    delta = of()
    for path, new in edits.items():
        holder, key = at(delta.manifest, path)
        holder[key] = new
    if drop:
        holder, key = at(delta.manifest, drop)
        del holder[key]
    return assemble(delta)


def with_text(old: str, new: str | bytes) -> bytes:
    """Return the small delta with one piece of the text of its manifest replaced."""
    replacement = new.encode() if isinstance(new, str) else new

    def replace(text: bytes) -> bytes:
        if text.count(old.encode()) != 1:
            raise ValueError(f"{old} occurs {text.count(old.encode())} times")
        return text.replace(old.encode(), replacement)

    return assemble(plain(), text=replace)


def with_entry(key: str, change: Callable[[dict[str, Any]], object]) -> bytes:
    """Return the small delta with the header's member of one entry altered in place."""

    def alter(header: dict[str, Any]) -> dict[str, Any]:
        change(header[key])
        return header

    return assemble(plain(), header=alter)


def with_header_text(old: bytes, new: bytes) -> bytes:
    """Return the small delta with the first of some text in its header replaced."""
    return assemble(plain(), header_text=lambda text: text.replace(old, new, 1))
