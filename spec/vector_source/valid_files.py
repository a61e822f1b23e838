"""Valid vectors of weight files, side files, names, notes and frames."""

from __future__ import annotations

import base64
import json
import random
from typing import Any

from vector_source.checkpoints import (
    SHARDS,
    WEIGHTS,
    Checkpoint,
    Place,
    Tensor,
    WeightFile,
    compact,
    folder,
    noise,
    nudged,
    one_file,
    tensor,
)
from vector_source.compressed_frames import FRAMES
from vector_source.frames import block, windowed_frame
from vector_source.vectors import Valid, vector
from vector_source.writer import Draft, assemble, draft


def files() -> list[Valid]:
    """Return weight files: sharding, order, headers."""
    a, b, c = noise("BF16", 8, 11), noise("F32", 5, 12), noise("I64", 2, 13)
    a2 = nudged(a, (1, 6))
    first, second = SHARDS
    weight_map = {"weight_map": {"a": first, "b": second, "c": second}}
    index = {"model.safetensors.index.json": json.dumps(weight_map, indent=1).encode()}
    single = one_file({"a": a, "b": b, "c": c})
    sharded = folder(WeightFile(first, {"a": a}), WeightFile(second, {"b": b, "c": c}), side=index)
    changed = folder(WeightFile(first, {"a": a2}), WeightFile(second, {"b": b, "c": c}), side=index)
    backwards = folder(
        WeightFile(second, {"b": b, "c": c}), WeightFile(first, {"a": a2}), side=index
    )
    alone = folder(WeightFile(WEIGHTS, {"a": a2, "b": b, "c": c}))
    metadata = {"z": "last first", "format": "pt", "": "no key", "a": "x\ud7ff\ue000"}
    metadata["text"] = 'quote " slash \\ / tab \t bell \x07 line\u2028 del \x7f é \U0001f600'
    spelled = WeightFile(WEIGHTS, {"a": a2, "b": b}, header=None)
    spelled.header = json.dumps(json.loads(spelled.canonical()), indent=2).encode() + b"   "
    empty = {"x": Tensor("F32", (0,), b""), "y": Tensor("F32", (0,), b""), "a": a2}
    swapped = WeightFile(WEIGHTS, empty)
    entries = json.loads(swapped.canonical())
    order = {name: dict(reversed(entries[name].items())) for name in ("a", "y", "x")}
    swapped.header = compact(order | {"__metadata__": {"b": "1.5", "a": ""}})
    escaped = WeightFile(WEIGHTS, {"\u00e9\n": a2})
    escaped.header = rb'{"\u00E9\u000a":' + escaped.canonical().split(b":", 1)[1].rstrip()
    long = WeightFile(WEIGHTS, {"a": a2})
    long.header = long.canonical() + b" " * 3000
    none = one_file({"a": a})
    third = WeightFile("c/model.safetensors", {"a": a2}, header=long.header)
    mixed = folder(spelled, WeightFile("b.safetensors", {"a": a}, {"format": "pt"}), third)

    hollow = folder(
        changed.weight_files[0], WeightFile("m.safetensors", {}), changed.weight_files[1]
    )

    def headed(name: str, shows: str, file: WeightFile) -> Valid:
        return vector(name, shows, none, folder(file), sources=from_a(file))

    def from_a(file: WeightFile) -> dict[Place, Place | None]:
        return {(WEIGHTS, name): (WEIGHTS, "a") for name in file.tensors if len(name) == 2}

    return [
        vector("sharded", "a sharded folder; its index is the base's", sharded, changed),
        vector("sharded_backwards", "weight files not in the order of paths", sharded, backwards),
        vector("file_to_shards", "base a file, target sharded", single, changed),
        vector("shards_to_file", "base sharded, target a file", sharded, one_file(alone.tensors())),
        vector("shards_to_folder", "base sharded, target a folder of one file", sharded, alone),
        vector("order", "tensors in another order", single, one_file({"c": c, "a": a, "b": b})),
        vector("metadata", "metadata in the order given", single, one_file({"a": a2}, metadata)),
        vector("metadata_empty", "metadata without members", single, one_file({"a": a}, {})),
        vector("file_named", "a file of any name", none, one_file({"a": a2}, path="out put.bin")),
        vector(
            "no_tensors", "a weight file without tensors", none, folder(WeightFile(WEIGHTS, {}))
        ),
        vector("no_tensors_between", "a weight file without tensors", sharded, hollow),
        headed("header_stored", "a header with spaces and line ends", spelled),
        headed("header_stored_order", "members of a stored header in another order", swapped),
        headed("header_stored_escapes", "a name with escapes in a stored header", escaped),
        headed("header_stored_frame", "a stored header that is a frame", long),
        vector("header_mixed", "stored and canonical headers in one target", single, mixed),
    ]


def side_files() -> list[Valid]:
    """Return side files and empty folders."""
    a = noise("BF16", 8, 14)
    there = {"config.json": b"{}\n", "sub/deep/kept.txt": b"kept", "gone.txt": b"gone", "none": b""}
    after = {
        "config.json": b'{"a": 1}\n',
        "sub/deep/kept.txt": b"kept",
        "sub/new.bin": bytes(range(256)) * 3,
        "none": b"",
        "empty.txt": b"",
        "long.txt": b"a" * (64 * 11 + 1024),  # as much as its frame of 11 bytes may hold
        "\u00e9t\u00e9 \U0001f600.txt": b"unicode",
        "sub.txt": b"a neighbour of the folder sub",
    }
    base = folder(WeightFile(WEIGHTS, {"a": a}), side=there)
    target = folder(WeightFile(WEIGHTS, {"a": nudged(a, (0,))}), side=after)
    shows = "side files changed, added, removed, the base's, empty, in subfolders, as a frame"
    out = [vector("side_files", shows, base, target)]
    shows = "a side file that the base has too is carried all the same"
    out.append(vector("side_files_carried", shows, base, target, carry=list(after)))
    hollow = folder(WeightFile(WEIGHTS, {"a": a}), side={"sub/f": b"f"})
    hollow.empty_folders = ["empty", "sub/a/b", "sub/c", "sub.d"]
    out.append(vector("empty_folders", "folders that hold nothing", base, hollow))
    bare = Checkpoint([], {"readme.md": b"text"})
    out.append(vector("no_weights", "a target without any weight file", base, bare))
    out.append(vector("nothing", "a target without any file", base, Checkpoint([])))
    side = ("model.safetensors.index.json", "other.SAFETENSORS", "safetensors")
    strange = folder(WeightFile(WEIGHTS, {"a": a}), side=dict.fromkeys(side, b""))
    odd = ["...a", ".gitignore", ".git2", "COM", "com10.txt", "LPTX", "a b", "-", "~a", "#a;'&%$"]
    odd += ["nul2", "c/.b", "\uffff", "\U0001f600", "\u0130", "\x80", "x" * 255, "\u00e9" * 127]
    odd += ["/".join("d" * 64), "/".join(["y" * 255] * 8), "w.safetensors", "other"]
    strange.empty_folders = odd
    out.append(vector("paths", "paths that are strange and allowed", base, strange))
    return out


def names() -> list[Valid]:
    """Return names that look like trouble."""
    tricky = [
        "sparsedelta:manifest",
        "manifest",
        "payload",
        "__metadata",
        "",
        ".",
        "..",
        "../up",
        "/root",
        "a/b",
        "a.b.c",
        "a:b",
        " space ",
        'quote " back \\ slash',
        "line\nbreak\ttab\x00null\x7f",
        "\b\f\r\x1f\u2028",
        "Stra\u00dfe",
        "e\u0301",
        "\u00e9",
        "\u6f22\u5b57",
        "\U0001f600",
        "\uffff",
        "A",
        "a",
        "null",
    ]
    base = {name: noise("U8", 3, i) for i, name in enumerate(tricky)}
    target = {name: nudged(one, (1,)) for name, one in base.items()}
    shows = "names that look like members, paths, escapes; normalisation and case keep them apart"
    out = [vector("names", shows, one_file(base), one_file(target))]
    long = {("layers." * 147)[:1023] + "w": noise("U8", 3, 1)}
    longer = {name: nudged(one, (1,)) for name, one in long.items()}
    shows = "a name of 1024 bytes, the longest"
    out.append(vector("name_long", shows, one_file(long), one_file(longer)))
    return out


def spelling() -> list[Valid]:
    """Return what a reader accepts though our writer does not write it."""
    a, b = noise("BF16", 8, 15), noise("F32", 5, 16)
    base = folder(WeightFile(WEIGHTS, {"a": a, "b": b}))
    target = folder(WeightFile(WEIGHTS, {"a": nudged(a, (1,)), "b": nudged(b, (0, 4))}))
    target.side_files["config.json"] = b"{}"

    def made(name: str, shows: str, of: Draft, **hooks: Any) -> Valid:
        return Valid(name, shows, base, target, assemble(of, **hooks))

    nested: Any = "deep"
    for _ in range(62):
        nested = [nested]
    info: dict[str, Any] = {"nested": nested, "float": -1.5e-300, "large": 1e300, "none": None}
    info |= {"most": 2**63, "least": -(2**63) - 1, "yes": True, "text": "\u00e9 \U0001f600 []{"}
    held = draft(base, target, notes={"more": [], "info": info}, base_id="org/model@0123456789abc")
    out = [made("notes", "free content in notes, nested 64 deep; a base id", held)]
    loose = draft(base, target)
    loose.notes = b' \t\r\n{ "\\ud83d\\ude00" : [ 1 , -0 , 1E4 , 0.50 ] ,\n"\\u0069nfo":{} } \n'
    out.append(made("notes_spelling", "notes with spaces, escapes and numbers of any form", loose))
    loose = draft(base, target, notes={"info": "x" * 2000})
    out.append(made("notes_frame", "notes that are a frame", loose))

    loose = draft(base, target)
    loose.notes = b"{" + b" " * 100_000 + b"}"
    out.append(made("notes_expand", "notes that expand a thousandfold", loose))
    text = b"z" * 40 + bytes(range(97, 123)) + b"z" * 40
    other = folder(*target.weight_files, side={"config.json": text})
    wide = draft(base, other)
    parts = [block(1, 40, b"z", False), block(0, 26, text[40:66], False), block(1, 40, b"z", True)]
    stored = windowed_frame(b"", 27, len(text))[:14] + b"".join(parts)
    wide.entries["file:config.json"] = stored
    wide.structure["target"]["side_files"][0][2] = len(stored)
    shows = "a frame with the widest window and in several blocks"
    out.append(Valid("frame_windowed", shows, base, other, assemble(wide)))
    shows = "lists that hold more than the rows need: layouts, codings, base files"
    spare = draft(base, target)
    spare.structure["layouts"] += [["F4", 4, "i1", [2]], spare.structure["layouts"][0]]
    spare.structure["codings"] += [["target", "tiles", "steps", 1]]
    spare.structure["base"]["files"] += ["spare.bin", WEIGHTS]
    out.append(made("spare", shows, spare))
    out.append(compressed())
    return out


def repetitive() -> tuple[Checkpoint, Checkpoint]:
    """Return base and target whose streams compress: short gaps, small steps, text that repeats."""
    draw = random.Random("repetitive")
    before = [0x3C00 + draw.getrandbits(9) for _ in range(1200)]
    after = list(before)
    position = draw.randrange(4)
    while position < len(after):
        after[position] += draw.choice((1, 1, 1, -1, -1, 2, -2, 300))
        position += 1 + min(int(draw.expovariate(0.4)), 20)
    text = "\n".join(f'"{n}": "token {n % 7}",' for n in range(90)).encode()
    old, new = (WeightFile(WEIGHTS, {"w": tensor("BF16", bits)}) for bits in (before, after))
    return folder(old), folder(new, side={"vocabulary.json": text})


def compressed() -> Valid:
    """Return a delta whose streams are frames of a compressor, kept in compressed_frames.py."""
    base, target = repetitive()
    delta = draft(base, target)
    frames = [base64.b85decode(one) for one in FRAMES]
    delta.entries = dict(zip(delta.entries, frames, strict=True))
    delta.structure["target"]["side_files"][0][2] = len(frames[0])
    delta.structure["chunks"]["stored"] = [len(one) for one in frames[1:]]
    shows = "frames with compressed blocks, one with a checksum: entropy coding, matches"
    return Valid("frames_compressed", shows, base, target, assemble(delta))
