"""Valid vectors of rows: tensors that come, change shape or dtype, or have another name."""

from __future__ import annotations

from typing import Any

from vector_source.checkpoints import (
    SHARDS,
    WEIGHTS,
    Checkpoint,
    Place,
    Tensor,
    WeightFile,
    folder,
    noise,
    nudged,
    one_file,
    tensor,
)
from vector_source.vectors import Valid, vector
from vector_source.writer import Coding, assemble, draft


def structure() -> list[Valid]:
    """Return tensors that come, go and change type or shape."""
    w, v = noise("BF16", 24, 6, (6, 4)), noise("F32", 6, 7)
    base = one_file({"w": w, "v": v})
    new = noise("F16", 5, 8)

    def to(name: str, shows: str, tensors: dict[str, Tensor], **options: Any) -> Valid:
        return vector(name, shows, base, one_file(tensors), **options)

    zeros = tensor("F32", [0] * 9)
    grown = Tensor("BF16", (8, 4), nudged(w, (3,)).data + noise("BF16", 8, 9).data)
    shrunk = Tensor("BF16", (4, 4), nudged(w, (3,)).data[:32])
    more = Tensor("BF16", (8, 4), w.data + bytes(16))
    scalar, empty = tensor("F32", [0x3F800000], ()), Tensor("BF16", (2, 0, 3), b"")
    kept = nudged(w, (1, 2, 20))
    retyped = noise("F16", 24, 10, (6, 4))
    keep_7, keep_0 = {"w": Coding(keep=7)}, {"w": Coding(keep=0)}
    out = [
        to("unchanged", "nothing changed", {"w": w, "v": v}),
        to("unchanged_beside_changed", "one tensor changed, one not", {"w": kept, "v": v}),
        to("added", "a tensor added", {"w": w, "new": new, "v": v}, default=Coding("bitmap")),
        to("added_zeros", "a tensor of zeros added: no chunk", {"w": w, "z": zeros, "v": v}),
        to("removed", "a tensor removed: no row names it", {"w": w}),
        to("removed_all", "every tensor removed: a file without tensors", {}),
        to("retyped", "another dtype, equal shape, other bytes", {"w": retyped, "v": v}),
        to(
            "retyped_same_bytes",
            "another dtype, equal bytes",
            {"w": Tensor("F16", (6, 4), w.data), "v": v},
        ),
        to(
            "reshaped",
            "another shape, equal bytes: the row is copied",
            {"w": Tensor("BF16", (4, 6), w.data), "v": v},
        ),
        to(
            "reshaped_and_changed",
            "another shape and changes",
            {"w": Tensor("BF16", (24,), kept.data), "v": v},
        ),
        to("resized_grown", "more rows: the first kept, changes in them", {"w": grown, "v": v}),
        to("resized_zeros", "more rows, all zero: no chunk", {"w": more, "v": v}),
        to("resized_shrunk", "fewer rows", {"w": shrunk, "v": v}),
        to(
            "resized_cut",
            "fewer rows and no change: no chunk, but a target digest",
            {"w": Tensor("BF16", (3, 4), w.data[:24]), "v": v},
        ),
        to("keep_part", "fewer elements kept", {"w": kept, "v": v}, codings=keep_7),
        to(
            "keep_none",
            "no element kept, dtype and shape equal",
            {"w": kept, "v": v},
            codings=keep_0,
        ),
        to(
            "keep_no_chunk",
            "fewer elements kept, the others zero: no chunk",
            {"w": Tensor("BF16", (6, 4), w.data[:14] + bytes(34)), "v": v},
            codings=keep_7,
        ),
    ]
    few = one_file({"s": scalar, "e": empty, "i": Tensor("I64", (0,), b"")})
    many = {"s": nudged(scalar, (0,)), "e": empty, "t": tensor("BOOL", [1], ())}
    many |= {"i": Tensor("I64", (3, 0), b""), "j": Tensor("U8", (0,), b"")}
    many |= {"k": Tensor("F32", (1 << 40, 1 << 40, 0), b"")}
    many |= {"d": tensor("U8", [1, 2], (1,) * 63 + (2,))}
    shows = "tensors without dimensions and without elements: copied, reshaped, added"
    out.append(vector("scalars_and_empty", shows, few, one_file(many)))
    both = one_file({"w": kept, "v": v, "new": new})
    shows = "no target digests of tensors with a base, but touched digests"
    out.append(vector("target_unknown", shows, base, both, known=False))
    coding = Coding(touched=False)
    shows = "no touched digests, but target digests"
    out.append(vector("touched_unknown", shows, base, both, default=coding))
    return out


def sources() -> list[Valid]:
    """Return rows whose base tensor has another name or file."""
    a, b, c = noise("BF16", 8, 31), noise("F32", 5, 32), noise("I64", 2, 33)
    a2 = nudged(a, (1, 6))
    first, second = SHARDS
    base = folder(WeightFile(first, {"a": a}), WeightFile(second, {"b": b, "c": c}))
    out = []

    def add(
        name: str,
        shows: str,
        target: Checkpoint,
        places: dict[Place, Place | None],
        of: Checkpoint = base,
        **options: Any,
    ) -> None:
        out.append(vector(name, shows, of, target, sources=places, **options))

    target = one_file({"x": a, "y": nudged(b, (2,))})
    add(
        "renamed",
        "tensors under other names, one of them changed",
        target,
        {(WEIGHTS, "x"): (first, "a"), (WEIGHTS, "y"): (second, "b")},
    )
    target = one_file({"b": a, "a": c})
    places: dict[Place, Place | None] = {
        (WEIGHTS, "b"): (first, "a"),
        (WEIGHTS, "a"): (second, "c"),
    }
    add("renamed_crosswise", "two tensors that exchange their names", target, places)
    target = one_file({f"model.{name}": one for name, one in {"a": a2, "b": b, "c": c}.items()})
    add(
        "prefixed",
        "one more prefix before every name",
        target,
        {(WEIGHTS, f"model.{name}"): (path, name) for path, name in base.places()},
    )
    target = folder(WeightFile(first, {"a": a2, "b": b}), WeightFile(second, {"c": c}))
    add("moved", "a tensor that moves to another shard", target, {})
    target = one_file({"a": a2, "tied": a, "part": Tensor("BF16", (3,), a.data[:6])})
    add(
        "shared",
        "three rows made from one base tensor",
        target,
        {(WEIGHTS, name): (first, "a") for name in ("a", "tied", "part")},
    )
    twins = folder(
        WeightFile("model.fp16.safetensors", {"w": noise("F16", 8, 34), "v": b}),
        WeightFile(WEIGHTS, {"w": b, "v": nudged(b, (0,))}),
    )
    after = folder(
        WeightFile("model.fp16.safetensors", {"w": nudged(noise("F16", 8, 34), (3,)), "v": b}),
        WeightFile(WEIGHTS, {"w": nudged(b, (1,)), "v": nudged(b, (0,))}),
    )
    add("same_names", "two files with tensors of the same names", after, {}, twins)
    add("added_all", "no row has a base", after, dict.fromkeys(after.places()), twins)

    # The base is laid out otherwise than when the delta was written.
    def given(name: str, shows: str, delta: bytes, base: Checkpoint, target: Checkpoint) -> None:
        out.append(Valid(name, shows, base, target, delta))

    target = folder(WeightFile(first, {"a": a2}), WeightFile(second, {"b": b, "c": c}))
    single = one_file({"a": a, "b": b, "c": c})
    delta = assemble(draft(base, target))
    given("base_one_file", "made from shards; the base is one file", delta, single, target)
    delta = assemble(draft(single, target))
    given("base_in_shards", "made from one file; the base is in shards", delta, base, target)
    other = folder(
        WeightFile("w.safetensors", {"a": nudged(a, (7,)), "b": Tensor("I32", (5,), b.data)}),
        WeightFile("x.safetensors", {"a": a, "b": b}),
        WeightFile("y.safetensors", {"a": Tensor("F16", (8,), a.data), "c": c}),
    )
    shows = "base tensors found in other files: by dtype, then by digest"
    given("base_found", shows, delta, other, target)
    here = folder(
        WeightFile(WEIGHTS, {"a": Tensor("F16", (8,), a.data), "b": b, "c": c}),
        WeightFile("x.safetensors", {"a": a}),
    )
    shows = "the tensor of the right file and name has another dtype; it is found elsewhere"
    given("base_found_retyped", shows, delta, here, target)
    here = folder(*base.weight_files, WeightFile("more.safetensors", {"a": b, "d": b}))
    shows = "the base has tensors that no row names"
    given("base_further", shows, assemble(draft(base, target)), here, target)
    return out
