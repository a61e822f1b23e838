"""Invalid vectors of digests and stored headers, FORMAT §12: R11 and R19, and of the base, §10."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from blake3 import blake3

from vector_source.checkpoints import (
    WEIGHTS,
    Checkpoint,
    Place,
    Tensor,
    WeightFile,
    folder,
    noise,
    nudged,
)
from vector_source.frames import smaller
from vector_source.samples import (
    CONFIG,
    HEADER,
    at,
    sample,
    sample_base,
    with_header,
    with_side_file,
)
from vector_source.vectors import Invalid
from vector_source.writer import Coding, Draft, assemble, draft

ZERO = bytes(16)


def headers() -> list[Invalid]:
    """Return R19: stored headers."""
    out = []
    text = with_header().entries[HEADER]

    def add(name: str, why: str, content: bytes) -> None:
        delta = with_header()
        stored = smaller(content)
        delta.entries[HEADER] = stored
        header = ["stored", len(content), len(stored)]
        delta.structure["target"]["weight_files"][0][2] = header
        delta.digests["headers"] = [blake3(content).digest()[:16]]
        out.append(Invalid("header_" + name, why, "R19", "corrupt", assemble(delta)))

    def altered(name: str, why: str, old: bytes, new: bytes) -> None:
        if text.count(old) != 1:
            raise ValueError(f"{old!r} is not once in {text!r}")
        add(name, why, text.replace(old, new))

    body = text.rstrip()
    add("empty", "an empty stored header", b"")
    add("text", "not JSON", body[:-1])
    add("list", "a list", b"[" + body + b"]")
    add("braces", "two objects", b"{}" + body)
    add("before", "a space before the object", b" " + text)
    add("mark", "a byte order mark before the object", b"\xef\xbb\xbf" + text)
    add("tab", "a tab after the object", text + b"\t")
    add("newline", "a line end after the object", text + b"\n")
    add("zero", "a zero byte after the object", text + b"\0")
    add("utf8", "not UTF-8", text.replace(b"new", b"n\xffw"))
    add("nan", "NaN in the metadata", b'{"__metadata__":{"a":NaN},' + body[1:])
    add(
        "twice_metadata",
        "a member twice in the metadata",
        b'{"__metadata__":{"a":1,"a":1},' + body[1:],
    )
    add("surrogate", "a lone surrogate", b'{"__metadata__":{"a":"\\ud800"},' + body[1:])
    deep = b'{"a":' * 63 + b"{}" + b"}" * 63
    add("nested", "nested 65 deep", b'{"__metadata__":' + deep + b"," + body[1:])
    for name, value in (("number", b'{"a":1}'), ("null", b"null"), ("list", b"[]")):
        wrong = b'{"__metadata__":' + value + b"," + body[1:]
        add(f"metadata_{name}", f"metadata {value.decode()}", wrong)
    altered("name", "another name", b'"new"', b'"old"')
    altered("dtype", "another dtype", b'"I32"', b'"U32"')
    altered("shape", "another shape of equal size", b"[3,1]", b"[1,3]")
    altered("offsets", "offsets that leave a hole", b"[12,24]", b"[16,28]")
    altered("order", "offsets that put the tensors in another order", b"[0,12]", b"[12,24]")
    swapped = text.replace(b"[0,12]", b"[]").replace(b"[12,24]", b"[0,12]")
    add("swapped", "the tensors in another order", swapped.replace(b"[]", b"[12,24]"))
    add("less", "a tensor less", text[: text.index(b',"new"')] + b"}")
    extra = b',"z":{"dtype":"U8","shape":[0],"data_offsets":[24,24]}}'
    add("more", "a tensor more", body[:-1] + extra)
    again = text[text.index(b'"new"') : text.rindex(b"}")]
    altered("twice", "a tensor twice", b"[12,24]}", b"[12,24]}," + again)
    altered("entry", "a tensor that is a number", text[8:].split(b',"new":')[0], b"5")
    altered("entry_null", "a tensor that is null", text[8:].split(b',"new":')[0], b"null")
    altered("member", "a member less", b'"dtype":"I32",', b"")
    altered("members", "a member more", b'"dtype":"I32",', b'"dtype":"I32","more":1,')
    altered("float", "an offset with a fraction", b"[12,24]", b"[12.0,24]")
    altered("true", "a dimension of true", b"[3,1]", b"[3,true]")
    altered("minus_zero", "an offset of -0", b"[0,12]", b"[-0,12]")
    altered("text_offset", "an offset that is a string", b"[0,12]", b'["0",12]')
    altered("dtype_null", "a dtype of null", b'"I32"', b"null")
    return out


def digests() -> list[Invalid]:
    """Return R11: digests."""
    out = []

    def add(name: str, why: str, delta: Draft, **options: Any) -> None:
        made = assemble(delta)
        out.append(Invalid("digest_" + name, why, "R11", "corrupt", made, **options))

    for i, kind in ((0, "canonical"), (1, "stored")):
        delta = sample()
        delta.digests["headers"][i] = ZERO
        add(f"header_{kind}", f"the digest of a {kind} header is wrong", delta)
    delta = with_side_file()
    delta.digests["side_files"][0] = blake3(b"other").digest()
    add("side_file", "the digest of a carried file is wrong", delta)
    delta = with_side_file()
    delta.entries[CONFIG] = b'{"a": 2}\n'
    add("side_content", "a carried file of the right size and other content", delta)
    delta = sample()
    delta.digests["chunks"][0] = ZERO
    add("chunk", "the digest of a chunk is wrong", delta)
    delta = sample()
    delta.digests["chunks"].reverse()
    delta.digests["chunks"][1] = blake3(b"").digest()[:16]
    add("chunk_other", "the digest of another chunk is wrong", delta)
    # Coded so that a wrong base gives the same target: a reader must check all that it can.
    for known in (True, False):
        for i, name in ((0, "before"), (8, "after")):
            delta = sample(Coding(values="target"), known=known)
            pair = bytearray(delta.digests["touched"][0])
            pair[i] ^= 1
            delta.digests["touched"][0] = bytes(pair)
            suffix = "" if known else "_alone"
            add(
                f"touched_{name}{suffix}",
                f"a touched digest ({name}) is wrong",
                delta,
                on_apply=True,
            )
    for i, name in ((0, "changed"), (1, "added"), (2, "resized")):
        delta = sample()
        delta.digests["target"][i] = ZERO
        add(
            f"target_{name}",
            f"the target digest of a tensor ({name}) is wrong",
            delta,
            on_apply=True,
        )
    delta = sample(Coding(touched=False))
    delta.digests["target"][0] = ZERO
    add("target_alone", "a target digest is wrong; no touched digest", delta, on_apply=True)
    return out


def against_the_base() -> list[Invalid]:
    """Return deltas that are refused when they are applied to the base (FORMAT §10)."""
    out = []
    structure, mismatch = "structure_mismatch", "base_mismatch"

    def add(name: str, why: str, step: str, code: str, delta: Draft) -> None:
        out.append(Invalid("apply_" + name, why, step, code, assemble(delta), on_apply=True))

    def edit(name: str, why: str, code: str, path: str, value: Any) -> None:
        delta = sample()
        holder, key = at(delta.structure, path)
        holder[key] = value
        add(name, why, "§10.2" if code == structure else "§10.3", code, delta)

    for name, row, layout in (
        ("shape", 4, ["U8", 8, "i1", [2, 2]]),
        ("size", 4, ["U8", 8, "i1", [5]]),
        ("dtype", 4, ["I8", 8, "i1", [4]]),
        ("dtype_unknown", 4, ["u8", 8, "i1", [4]]),
        ("bits", 4, ["U8x", 8, "i1", [4]]),
    ):
        delta = sample()
        delta.structure["layouts"][row] = layout
        delta.structure["tensors"]["keep"] = []
        if layout[0] == "U8":
            delta.structure["tensors"]["keep"] = [[3, 3]]
        add(name, f"a base tensor is {layout[0]} {layout[3]}", "§10.2", structure, delta)
    edit("name", "a tensor that the base lacks", structure, "tensors.base_names.0.1", "game")
    edit("name_case", "a name in capitals", structure, "tensors.base_names.0.1", "GONE")
    edit(
        "name_metadata",
        "a base name __metadata__",
        structure,
        "tensors.base_names.0.1",
        "__metadata__",
    )
    delta = sample()
    delta.digests["side_files"][1] = bytes(32)
    add("side_digest", "a side file is not the base's", "§10.3", mismatch, delta)
    kept = "target.side_files.1."
    edit("side_size", "the size of a side file is not the base's", mismatch, kept + "1", 6)
    edit("side_missing", "a side file that the base lacks", mismatch, kept + "0", "lost.txt")
    for i, name in ((0, "changed"), (1, "copied"), (2, "resized")):
        # Coded so that the target's digest proves nothing of the base.
        delta = sample(Coding(values="target"))
        delta.digests["base"][i] = ZERO
        add(f"base_{name}", f"a base tensor ({name}) is not the base's", "§10.5", mismatch, delta)
    delta = sample(known=False)
    delta.digests["base"][0] = ZERO
    add(
        "base_unknown",
        "a base tensor is not the base's; no target digest",
        "§10.5",
        mismatch,
        delta,
    )
    out += applied()
    return out


def other_base(tensors: dict[str, Tensor], side: dict[str, bytes] | None = None) -> Checkpoint:
    """Return the sample base with other tensors and side files."""
    base = sample_base()
    base.weight_files[0].tensors |= tensors
    base.side_files |= side or {}
    return base


def applied() -> list[Invalid]:
    """Return deltas whose target the base is, or seems to be (FORMAT §10.5)."""
    out = []
    done = sample_base()
    old = done.tensors()
    w, same, gone = old["w"], old["same"], old["gone"]
    before = {"w": nudged(w, (1,)), "same": nudged(same, (1,))}
    already, partly, mismatch = "already_applied", "partly_applied", "base_mismatch"
    structure = "structure_mismatch"

    def add(
        name: str,
        why: str,
        code: str,
        base: Checkpoint,
        target: Checkpoint = done,
        *,
        sources: dict[Place, Place | None] | None = None,
        carry: Sequence[str] | None = None,
        known: bool = True,
    ) -> None:
        delta = draft(base, target, sources=sources, carry=carry, known=known)
        made = assemble(delta)
        out.append(Invalid("apply_" + name, why, "§10.5", code, made, on_apply=True))

    add("already", "the base is the target", already, other_base(before))
    base = other_base({"w": Tensor("F16", (8,), nudged(w, (1,)).data)})
    add("already_retyped", "the same, of a tensor whose dtype changes", already, base)
    base = other_base({"same": Tensor("I32", (4,), same.data + b"\1\0\0\0")})
    add("already_resized", "the same, of a tensor whose size changes", already, base)
    base = other_base({"x": nudged(w, (1,))})
    sources: dict[Place, Place | None] = {(WEIGHTS, "w"): (WEIGHTS, "x")}
    add(
        "already_renamed",
        "the same, of a tensor under another name",
        already,
        base,
        sources=sources,
    )
    base = other_base(before, {"kept.txt": b"lost\n"})
    target = sample_base()
    target.side_files["kept.txt"] = b"lost\n"
    why = "the same, with a side file that is not the base's"
    add("already_side", why, already, base, target)
    target = sample_base()
    target.weight_files[0].tensors = {"w": w, "same": nudged(same, (2,)), "gone": gone}
    base = other_base({"w": before["w"]})
    why = "one changed tensor is the target's, the other the base's"
    add("partly", why, partly, base, target)
    target = sample_base()
    target.weight_files[0].tensors["new"] = noise("U8", 4, 9)
    why = "a changed tensor is the target's, an added one is missing"
    add("partly_added", why, partly, other_base({"w": before["w"]}), target)
    base = other_base({"w": before["w"], "same": nudged(same, (1,))})
    target = other_base({"same": nudged(same, (2,))})
    why = "one changed tensor is the target's, the other neither"
    add("partly_not", why, mismatch, base, target)
    why = "the base is the target, whose digests are not known"
    add("already_unknown", why, mismatch, other_base(before), known=False)
    why = "no row is changed, and one is not the base's"
    add("copied_not", why, mismatch, other_base(before), other_base(before))
    base = other_base({"w": Tensor("F16", (8,), nudged(w, (1,)).data)})
    target = other_base({"w": Tensor("I16", (8,), w.data)})
    why = "the base has the target's bytes under another dtype"
    add("already_not_dtype", why, structure, base, target)
    target = other_base({"w": replace(w, shape=(2, 4))})
    base = other_base({"w": replace(nudged(w, (1,)), shape=(2, 4))})
    why = "the base has the target's bytes in another shape"
    add("already_not_shape", why, structure, base, target)
    base = folder(WeightFile("model.fp16.safetensors", {"w": before["w"]}))
    target = folder(WeightFile("model.fp16.safetensors", {"w": w}))
    why = "the target's tensor is in the base, but in another file"
    add("already_not_file", why, mismatch, base, target)
    return out
