"""The deltas that the invalid vectors alter, and ways to alter them; digests follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from blake3 import blake3

from vector_source.checkpoints import (
    WEIGHTS,
    Checkpoint,
    Place,
    Tensor,
    WeightFile,
    compact,
    folder,
    noise,
    nudged,
    tensor,
)
from vector_source.writer import Coding, Draft, add_chunk, assemble, draft

PART = "part.safetensors"
CONFIG, HEADER = "file:config.json", "header:" + PART


def sample_base() -> Checkpoint:
    """Return the base of all invalid vectors."""
    tensors = {"w": noise("BF16", 8, 21), "same": noise("I32", 3, 23), "gone": noise("U8", 4, 24)}
    side = {"kept.txt": b"kept\n", "config.json": b"{}\n"}
    return folder(WeightFile(WEIGHTS, tensors), side=side)


def sample(changed: Coding = Coding(), *, known: bool = True) -> Draft:  # noqa: B008 - frozen
    """Return a delta with something of everything; its tensor `w` is coded as `changed`.

    Its rows are w, changed; same, copied from another file; new, added; kin, renamed and resized.
    """
    base = sample_base()
    old = base.tensors()
    kin = Tensor("U8", (6,), old["gone"].data[:3] + b"\7\0\0")
    weights = WeightFile(WEIGHTS, {"w": nudged(old["w"], (2, 3, 6))}, {"format": "pt"})
    part = {"same": old["same"], "new": tensor("F32", [0, 7, 9], (3, 1)), "kin": kin}
    second = WeightFile(PART, part)
    second.header = second.canonical()
    target = folder(weights, second)
    target.side_files = {"config.json": b'{"a": 1}\n', "kept.txt": b"kept\n"}
    target.empty_folders = ["logs", "tmp"]
    codings = {"new": Coding("bitmap"), "w": changed, "kin": Coding(keep=3)}
    sources: dict[Place, Place | None] = {(PART, "kin"): (WEIGHTS, "gone")}
    return draft(base, target, codings, sources=sources, known=known)


def with_header() -> Draft:
    """Return a small delta with a stored header, of two tensors."""
    tensors = {"same": noise("I32", 3, 23), "new": tensor("F32", [0, 7, 9], (3, 1))}
    part = WeightFile(PART, tensors)
    part.header = part.canonical()
    return draft(folder(WeightFile(PART, {"same": tensors["same"]})), folder(part))


def plain() -> Draft:
    """Return a smaller delta, for vectors that need no more: one tensor changed."""
    old = {"w": noise("BF16", 4, 21)}
    target = folder(WeightFile(WEIGHTS, {"w": nudged(old["w"], (2,))}))
    return draft(folder(WeightFile(WEIGHTS, old)), target)


def with_side_file(path: str = "config.json", content: bytes = b'{"a": 1}\n') -> Draft:
    """Return a small delta that carries a side file and holds no tensor."""
    one = folder(WeightFile(WEIGHTS, {}))
    return draft(one, folder(WeightFile(WEIGHTS, {}), side={path: content}))


def with_streams(
    coding: Coding,
    nnz: int,
    streams: Sequence[bytes],
    *,
    span: int | None = None,
    start: int = 0,
    old: Tensor | None = None,
    new: Tensor | None = None,
    of: Draft | None = None,
) -> Draft:
    """Return a delta of one changed tensor with a chunk of these raw streams.

    Args:
        coding: names the streams.
        nnz: positions.
        streams: written as they are.
        span: from the start to the end of the tensor unless given.
        start: the first element.
        old: the base tensor; the sample base's `w` unless given.
        new: the target tensor; it matters when the delta is applied.
        of: a delta that this function returned, which gets one more chunk.
    """
    old = old or sample_base().tensors()["w"]
    n_elements = len(old.data) // old.width
    delta = of
    if delta is None:
        new = new or nudged(old, (0,))
        base, target = (folder(WeightFile(WEIGHTS, {"w": one})) for one in (old, new))
        delta = draft(base, target)
        delta.structure["codings"] = []
        delta.structure["chunks"] = {name: [] for name in delta.structure["chunks"]}
        delta.digests |= {"chunks": [], "touched": []}
        delta.entries = {}
    one = Coding(coding.index, coding.values, packing=coding.packing, classes=coding.classes)
    one = Coding(**(vars(one) | {"thresholds": coding.thresholds, "touched": False}))
    add_chunk(delta, one, start, n_elements - start if span is None else span, nnz, streams)
    delta.structure["tensors"]["n_chunks"] = [len(delta.digests["chunks"])]
    return delta


def at(value: Any, path: str) -> tuple[Any, Any]:
    """Return the container and the key of a dotted path within nested JSON."""
    steps: list[str | int] = [int(s) if s.lstrip("-").isdigit() else s for s in path.split(".")]
    for step in steps[:-1]:
        value = value[step]
    return value, steps[-1]


def with_manifest(edits: dict[str, Any], drop: str = "", of: Callable[[], Draft] = sample) -> bytes:
    """Return a delta with members of its structure set, by dotted path, and one left out."""
    delta = of()
    for path, new in edits.items():
        holder, key = at(delta.structure, path)
        holder[key] = new
    if drop:
        holder, key = at(delta.structure, drop)
        del holder[key]
    return assemble(delta)


def with_true_header(delta: Draft, members: dict[str, Any] | bytes) -> Draft:
    """Return a delta with the digest of a header of these members for its one weight file."""
    text = members if isinstance(members, bytes) else compact(members)
    text += b" " * (-len(text) % 8)
    delta.digests["headers"] = [blake3(text).digest()[:16]]
    return delta


def with_text(old: str, new: str | bytes) -> bytes:
    """Return the small delta with one piece of the text of its structure replaced."""
    replacement = new.encode() if isinstance(new, str) else new

    def replace(text: bytes) -> bytes:
        if text.count(old.encode()) != 1:
            raise ValueError(f"{old} occurs {text.count(old.encode())} times")
        return text.replace(old.encode(), replacement)

    return assemble(plain(), text=replace)


def with_notes(notes: bytes) -> bytes:
    """Return the small delta with these notes."""
    delta = plain()
    delta.notes = notes
    return assemble(delta)


def with_header_text(old: bytes, new: bytes) -> bytes:
    """Return the small delta with some text in its header replaced, padded again."""

    def replace(header: bytes) -> bytes:
        if header.count(old) != 1:
            raise ValueError(f"{old!r} occurs {header.count(old)} times")
        text = header.rstrip(b" ").replace(old, new)
        return text + b" " * (-len(text) % 8)

    return assemble(plain(), header=replace)
