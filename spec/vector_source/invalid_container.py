"""Invalid vectors of the container: FORMAT §12, R1 to R9."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

from blake3 import blake3

from vector_source.samples import (
    CONFIG,
    HEADER,
    Invalid,
    plain,
    sample,
    with_entry,
    with_header,
    with_header_text,
    with_side_file,
)
from vector_source.valid import WEIGHTS, noise
from vector_source.writer import Draft, WeightFile, assemble, compact, frame

MANIFEST = "sparsedelta:manifest"


def truncated() -> list[Invalid]:
    """Return R1: files that end early."""
    whole = assemble(plain())
    n_header = int.from_bytes(whole[:8], "little")

    def cut(name: str, why: str, data: bytes) -> Invalid:
        return Invalid("truncated_" + name, why, "R1", "truncated", data)

    longer = (len(whole) - 7).to_bytes(8, "little") + whole[8:]
    return [
        cut("empty", "an empty file", b""),
        cut("length", "seven bytes", whole[:7]),
        cut("header", "the file ends within the header", whole[: n_header // 2]),
        cut("at_header", "the file ends with the header", whole[: 8 + n_header]),
        cut("by_one", "the last byte is missing", whole[:-1]),
        cut("before", "the header is one byte longer than the file", longer),
    ]


def magic() -> list[Invalid]:
    """Return R2 to R4: what is no delta, or of another version."""
    out = []

    def add(name: str, why: str, breaks: str, code: str, data: bytes) -> None:
        out.append(Invalid(name, why, breaks, code, data))

    def bad(name: str, why: str, text: Callable[[bytes], bytes]) -> None:
        add(name, why, "R2", "bad_magic", assemble(plain(), header_text=text))

    def meta(name: str, why: str, change: Callable[[dict[str, Any]], object], rule: str) -> None:
        code = {"R2": "bad_magic", "R3": "unsupported_version", "R4": "corrupt"}[rule]
        add(name, why, rule, code, with_entry("__metadata__", change))

    bad("header_text", "the header is no JSON", lambda text: text[:-1])
    bad("header_list", "the header is a list", lambda text: b"[" + text + b"]")
    bad("header_utf8", "the header is no UTF-8", lambda text: text.replace(b'"w"', b'"\xff"'))
    bad("header_nan", "NaN in the header", lambda text: text[:-1] + b',"n":NaN}')
    bad("header_tab", "a tab after the header's object", lambda text: text + b"\t")
    bad("header_before", "a space before the header's object", lambda text: b" " + text)
    bad("header_zero", "a zero byte after the header's object", lambda text: text + b"\0")
    bad("header_mark", "a byte order mark before the object", lambda text: b"\xef\xbb\xbf" + text)
    bad("header_empty", "a header of spaces", lambda text: b" " * 8)
    add("header_none", "a header of length 0", "R2", "bad_magic", bytes(8))
    weights = WeightFile(WEIGHTS, {"w": noise("U8", 4, 1)}, {"format": "pt"})
    add("safetensors", "a safetensors file of weights", "R2", "bad_magic", weights.content())
    weights.metadata = None
    add("no_metadata", "a safetensors file without metadata", "R2", "bad_magic", weights.content())

    def listed(header: dict[str, Any]) -> dict[str, Any]:
        return header | {"__metadata__": [["format", "sparsedelta"]]}

    data = assemble(plain(), header=listed)
    add("metadata_list", "__metadata__ is a list", "R2", "bad_magic", data)
    meta("format_missing", "format is missing", lambda m: m.pop("format"), "R2")
    meta("format_case", "format is Sparsedelta", lambda m: m.update(format="Sparsedelta"), "R2")
    for name, version in (("2", "2"), ("zero", "0"), ("padded", "01"), ("point", "1.0")):
        change = partial(dict.update, format_version=version)
        meta(f"version_{name}", f"format_version is {version}", change, "R3")
    meta("metadata_more", "a fourth member", lambda m: m.update(more="x"), "R4")
    meta("version_missing", "no format_version", lambda m: m.pop("format_version"), "R4")
    meta("digest_missing", "no manifest_digest", lambda m: m.pop("manifest_digest"), "R4")
    twice = b'"format":"sparsedelta",'
    data = with_header_text(twice, twice * 2)
    add("metadata_twice", "a member of __metadata__ twice", "R4", "corrupt", data)
    data = with_header_text(b'"dtype":"U8",', b'"dtype":"U8","dtype":"U8",')
    add("entry_member_twice", "a member of an entry twice", "R4", "corrupt", data)

    def again(text: bytes) -> bytes:
        return text[:-1] + b"," + text[text.index(b'"w":') :]

    data = assemble(plain(), header_text=again)
    add("entry_twice", "an entry's key twice", "R4", "corrupt", data)
    return out


def entries() -> list[Invalid]:
    """Return R5 to R9: entries and digests."""
    out = []

    def add(name: str, why: str, breaks: str, data: bytes) -> None:
        out.append(Invalid(name, why, breaks, "corrupt", data))

    def entry(name: str, why: str, change: Callable[[dict[str, Any]], object]) -> None:
        add("entry_" + name, why, "R5", with_entry("w", change))

    entry("dtype", "an entry is I8", lambda e: e.update(dtype="I8"))
    entry("dtype_list", "the dtype of an entry is a list", lambda e: e.update(dtype=["U8"]))
    entry("two_dimensions", "two dimensions", lambda e: e.update(shape=[1, *e["shape"]]))
    entry("no_dimension", "no dimension", lambda e: e.update(shape=[]))
    entry("shape", "shape and offsets disagree", lambda e: e["shape"].append(e["shape"].pop() + 1))
    entry("reversed", "offsets the wrong way round", lambda e: e["data_offsets"].reverse())
    entry("three_offsets", "three offsets", lambda e: e["data_offsets"].append(9))
    entry("float", "an offset with a fraction", lambda e: e.update(shape=[float(e["shape"][0])]))
    entry("string", "a size as a string", lambda e: e.update(shape=[str(e["shape"][0])]))
    entry("negative", "a negative offset", lambda e: e["data_offsets"].__setitem__(0, -1))
    entry("huge", "an offset of 2^63", lambda e: e["data_offsets"].__setitem__(1, 1 << 63))
    entry("member_missing", "an entry without shape", lambda e: e.pop("shape"))
    entry("member_more", "an entry with another member", lambda e: e.update(more=1))

    def extra(value: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
        return lambda header: header | {"more": value}

    end = sum(map(len, plain().entries.values()))
    add("entry_list", "an entry is a list", "R5", assemble(plain(), header=extra([])))
    whole = assemble(plain())
    n_data = len(whole) - 8 - int.from_bytes(whole[:8], "little")
    for name, shape, offsets in (
        ("size_0", [0], [n_data, n_data]),
        ("true", [True], [n_data, n_data + 1]),
    ):
        value = {"dtype": "U8", "shape": shape, "data_offsets": offsets}
        data = assemble(plain(), header=extra(value), whole=lambda data: data + b"\0")
        if name == "size_0":
            data = data[:-1]
        add("entry_" + name, f"an entry of shape {json.dumps(shape)}", "R5", data)

    def moved(key: str, by_begin: int, by_end: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
        def alter(header: dict[str, Any]) -> dict[str, Any]:
            begin, stop = header[key]["data_offsets"]
            header[key]["data_offsets"] = [begin + by_begin, stop + by_end]
            header[key]["shape"] = [stop + by_end - begin - by_begin]
            return header

        return alter

    add(
        "overlap",
        "an entry begins within another",
        "R6",
        assemble(plain(), header=moved("w", -1, 0)),
    )
    add(
        "hole",
        "a byte between two entries is in none",
        "R6",
        assemble(plain(), header=moved("w", 1, 0)),
    )
    add(
        "trailing",
        "a byte after the last entry",
        "R6",
        assemble(plain(), whole=lambda d: d + b"\0"),
    )
    add(
        "trailing_short",
        "the last entry ends early",
        "R6",
        assemble(plain(), header=moved("w", 0, -1)),
    )

    def shared(header: dict[str, Any]) -> dict[str, Any]:
        return header | {"more": header["w"]}

    add("same_bytes", "two entries of the same bytes", "R6", assemble(plain(), header=shared))

    def manifest_last(header: dict[str, Any]) -> dict[str, Any]:
        n = header[MANIFEST]["shape"][0]
        for key, value in header.items():
            if key not in ("__metadata__", MANIFEST):
                value["data_offsets"] = [offset - n for offset in value["data_offsets"]]
        header[MANIFEST]["data_offsets"] = [end, end + n]
        return header

    def rotated(whole: bytes) -> bytes:
        start = 8 + int.from_bytes(whole[:8], "little")
        n = len(whole) - start - end
        return whole[:start] + whole[start + n :] + whole[start : start + n]

    data = assemble(plain(), header=manifest_last, whole=rotated)
    add("manifest_last", "the manifest is the last entry", "R7", data)

    def renamed(header: dict[str, Any]) -> dict[str, Any]:
        return {"sparsedelta:manifesto" if k == MANIFEST else k: v for k, v in header.items()}

    add("manifest_missing", "no manifest", "R7", assemble(plain(), header=renamed))
    meta = {"format": "sparsedelta", "format_version": "1", "manifest_digest": "00" * 32}
    text = compact({"__metadata__": meta})
    add("no_entries", "no entry at all", "R7", len(text).to_bytes(8, "little") + text)

    def digest(to: Callable[[str], Any]) -> bytes:
        key = "manifest_digest"
        return with_entry("__metadata__", lambda m: m.update({key: to(m[key])}))

    def turned(digest: str) -> str:
        return ("1" if digest[0] == "0" else "0") + digest[1:]

    add("manifest_digest", "manifest_digest is wrong", "R8", digest(turned))
    add("manifest_digest_upper", "manifest_digest in capitals", "R8", digest(str.upper))
    add("manifest_digest_short", "manifest_digest of 31 bytes", "R8", digest(lambda d: d[:-2]))
    add("manifest_digest_number", "manifest_digest is a number", "R8", digest(lambda d: 0))
    delta = plain()
    right = blake3(b"".join(delta.entries.values())).hexdigest()
    delta.manifest["payload_digest"] = turned(right)
    add("payload_digest", "payload_digest is wrong", "R8", assemble(delta))
    delta = plain()
    delta.manifest["payload_digest"] = right.upper()
    add("payload_digest_upper", "payload_digest in capitals", "R11", assemble(delta))

    def renamed_entry(name: str, why: str, old: str, new: str) -> None:
        delta = plain()
        delta.entries = {new if key == old else key: one for key, one in delta.entries.items()}
        add("entries_" + name, why, "R9", assemble(delta))

    def added_entry(name: str, why: str, key: str, of: Callable[[], Draft] = plain) -> None:
        delta = of()
        delta.entries[key] = frame(b"x")
        add("entries_" + name, why, "R9", assemble(delta))

    def missing_entry(name: str, why: str, key: str, of: Callable[[], Draft] = plain) -> None:
        delta = of()
        del delta.entries[key]
        add("entries_" + name, why, "R9", assemble(delta))

    added_entry("unknown", "an entry that no row calls for", "y")
    added_entry("reserved", "an entry of a reserved name that does not exist", "sparsedelta:other")
    added_entry("unchanged", "an entry for a tensor that is unchanged", "same", with_header)
    added_entry("removed", "an entry for a tensor that is removed", "gone")
    added_entry(
        "not_carried",
        "an entry for a file that is not carried",
        "sparsedelta:file/kept.txt",
        sample,
    )
    added_entry("canonical", "a stored header for a canonical one", "sparsedelta:header/" + WEIGHTS)
    renamed_entry(
        "prefixed", "a tensor's entry with a prefix it must not have", "w", "sparsedelta:tensor/w"
    )
    missing_entry("tensor", "the entry of a tensor is missing", "w")
    missing_entry("file", "the entry of a carried file is missing", CONFIG, with_side_file)
    missing_entry("header", "the entry of a stored header is missing", HEADER, with_header)
    return out
