"""The manifest: exact bytes out, every rule of FORMAT §12 held on the way in."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from sparsedelta.codecs.chunk import Chunk, Coding
from sparsedelta.codecs.zstd import compress_text
from sparsedelta.dtypes import DTYPES, check_dtype
from sparsedelta.errors import Corrupt, FormatError, LimitExceeded, UnsupportedFeature
from sparsedelta.format import manifest as manifest_module
from sparsedelta.format.manifest import Manifest, parse_manifest, read_text, render_manifest
from sparsedelta.format.records import (
    Base,
    BaseTensor,
    Row,
    SideFile,
    Stored,
    Target,
    TensorSpec,
    WeightFile,
)
from sparsedelta.format.strict_json import compact_json

A, B, C = b"\xa1" * 16, b"\xb2" * 16, b"\xc3" * 16
PAYLOAD_BYTES = 7 + 9 + 12 + 11
ULP = Coding("ulp", "gaps", "planes", classes=False)
SORTED = Coding("target", "rice", "steps", classes=True)


def spec(shape: tuple[int, ...], digest: bytes | None, dtype: str = "BF16") -> TensorSpec:
    return TensorSpec(DTYPES[dtype], shape, digest)


def sample() -> Manifest:
    """Return a manifest with one of everything."""
    chunks = (
        Chunk(3, 100, 4, ULP, (4,), (4, 4, 4), b"\x0a" * 16, (b"\x01" * 8, b"\x02" * 8), 16),
        Chunk(103, 97, 5, SORTED, (6, 7), (6, 5), b"\x0b" * 16, None, 28),
    )
    return Manifest(
        Base("org/model@4f1e", n_unused=2),
        Target(
            True,
            (
                WeightFile("a.safetensors", b"\x21" * 16, {"format": "pt", "a": "é"}, None),
                WeightFile("b.safetensors", b"\x22" * 16, None, Stored(20, 9, 7)),
                WeightFile("empty.safetensors", b"\x23" * 16, None, None),
            ),
            (
                SideFile("config.json", 7, b"\x31" * 32, Stored(7, 7, 0)),
                SideFile("x/y", 0, b"\x32" * 32, None),
            ),
            ("empty",),
        ),
        (
            Row("a.safetensors", "w", spec((300,), B), _base("w", spec((300,), A)), 300, chunks),
            Row("a.safetensors", "same", spec((2,), A), _base("old", spec((2,), A)), 2, ()),
            Row("b.safetensors", "w", spec((4,), C), _base("w", spec((3, 2), A)), 1, ()),
            Row("b.safetensors", "new", spec((0,), C, "U8"), None, 0, ()),
        ),
        {"lr": 1e-3, "é": [None, True, -5]},
    )


def _base(name: str, own: TensorSpec) -> BaseTensor:
    return BaseTensor("model.safetensors", name, own)


STRUCTURE = (
    '{"requires":[],"base":{"id":"org/model@4f1e","n_unused":2,"files":["model.safetensors"]},'
    '"target":{"kind":"folder","digests":true,"weight_files":[["a.safetensors",2,["canonical",'
    '[["format","pt"],["a","é"]]]],["b.safetensors",2,["stored",20,9]],'
    '["empty.safetensors",0,["canonical",null]]],'
    '"side_files":[["config.json",7,7],["x/y",0,-1]],"empty_folders":["empty"]},'
    '"layouts":[["BF16",16,"f2",[300]],["BF16",16,"f2",[2]],["BF16",16,"f2",[4]],'
    '["BF16",16,"f2",[3,2]],["U8",8,"i1",[0]]],'
    '"tensors":{"names":["w","same","w","new"],"layouts":[0,1,2,4],"base_files":[0,0,0,-1],'
    '"base_names":[[1,"old"]],"base_layouts":[[2,3]],"keep":[[2,1]],"n_chunks":[2,0,0,0]},'
    '"codings":[["ulp","gaps","planes",0],["target","rice","steps",1]],'
    '"chunks":{"starts":[3,103],"spans":[100,97],"nnz":[4,5],"codings":[0,1],"touched":[1,0],'
    '"raw":[4,6,7],"stored":[4,4,4,6,5]}}'
)
NOTES = '{"info":{"lr":0.001,"é":[null,true,-5]}}'
DIGESTS = b"".join(
    [
        *(bytes([n]) * 16 for n in (0x21, 0x22, 0x23)),
        *(bytes([n]) * 32 for n in (0x31, 0x32)),
        *(A, A, A),  # of base tensors
        *(B, C, C),  # of made tensors; the copied one has its base's
        *(b"\x0a" * 16, b"\x0b" * 16),
        *(b"\x01" * 8, b"\x02" * 8),
    ]
)


def split(raw: bytes) -> tuple[bytes, bytes, bytes]:
    """Return structure, notes and digests of a manifest."""
    sizes = [int.from_bytes(raw[at : at + 4], "little") for at in range(0, 16, 4)]
    middle, end = 16 + sizes[1], 16 + sizes[1] + sizes[3]
    texts = read_text(raw[16:middle], sizes[0]), read_text(raw[middle:end], sizes[2])
    return *texts, raw[end:]


def joined(structure: bytes, notes: bytes = b"{}", digests: bytes = DIGESTS) -> bytes:
    """Return a manifest of these parts."""
    stored = [(text, compress_text(text)) for text in (structure, notes)]
    sizes = [len(one) for pair in stored for one in pair]
    head = b"".join(size.to_bytes(4, "little") for size in sizes)
    return head + b"".join(coded for _, coded in stored) + digests


def parse(structure: bytes, notes: bytes = b"{}", digests: bytes = DIGESTS) -> Manifest:
    return parse_manifest(joined(structure, notes, digests), PAYLOAD_BYTES)


def test_exact_bytes() -> None:
    structure, notes, digests = split(render_manifest(sample()))
    assert structure.decode() == STRUCTURE
    assert notes.decode() == NOTES
    assert digests == DIGESTS


def test_what_is_written_is_read() -> None:
    parsed = parse_manifest(render_manifest(sample()), PAYLOAD_BYTES)
    assert parsed == sample()
    assert [one.offset for one in parsed.stored()] == [0, 7, 16, 28]
    assert render_manifest(parsed) == render_manifest(sample())


def test_unknown_target_digests_and_a_single_file() -> None:
    first, same, *_ = sample().tensors
    chunk = replace(first.chunks[0], offset=0)
    row = replace(first, target=spec((300,), None), chunks=(chunk,))
    target = Target(False, (WeightFile("any name", A, None, None),), (), ())
    rows = tuple(replace(one, file="any name") for one in (row, same))
    rows += (Row("any name", "new", spec((5,), C), None, 0, ()),)
    one = Manifest(Base(None), target, rows, {})
    structure, _, digests = split(render_manifest(one))
    assert json.loads(structure)["target"]["digests"] is False
    # Of a tensor without a base there is a digest in any case; that of the copied one is known.
    assert digests == A + A + A + C + chunk.digest + b"\x01" * 8 + b"\x02" * 8
    assert parse_manifest(render_manifest(one), 12) == one
    # One tensor whose digest is not known leaves those of others out.
    shorter = replace(rows[0], name="shorter", target=spec((9,), B), keep=9, chunks=())
    known = replace(one, tensors=(rows[0], shorter))
    assert parse_manifest(render_manifest(known), 12).tensors[1].target.digest is None


def test_base_digests_are_the_targets_of_copied_tensors_only() -> None:
    reshaped = Row("f", "r", spec((2, 3), A), BaseTensor("g", "r", spec((6,), A)), 6, ())
    grown = Row("f", "g", spec((7,), B), BaseTensor("g", "g", spec((6,), A)), 6, ())
    target = Target(False, (WeightFile("f", C, None, None),), (), ())
    one = Manifest(Base(None), target, (reshaped, grown), {})
    assert reshaped.is_copied
    assert not grown.is_copied
    assert split(render_manifest(one))[2] == C + A + A + B
    assert parse_manifest(render_manifest(one), 0) == one


def test_unknown_dtypes_keep_their_bits() -> None:
    dtypes = [check_dtype("X24", 24, "i1"), check_dtype("X4", 4, "i1"), check_dtype("Y", 32, "f2")]
    rows = tuple(Row("f", dtype.name, TensorSpec(dtype, (4,), A), None, 0, ()) for dtype in dtypes)
    target = Target(False, (WeightFile("f", C, None, None),), (), ())
    one = Manifest(Base(None), target, rows, {})
    assert parse_manifest(render_manifest(one), 0) == one


def test_limits_of_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    first, *rest = sample().tensors
    for row in (
        replace(first, name="é" * 513),
        replace(first, base=_base("é" * 513, spec((2,), A))),
    ):
        with pytest.raises(LimitExceeded, match="1026 bytes of the name"):
            render_manifest(replace(sample(), tensors=(row, *rest)))
    with pytest.raises(LimitExceeded, match="bytes of notes"):
        render_manifest(replace(sample(), info={"x": "x" * (1 << 20)}))
    for limit, what in (
        ("MAX_ROWS", "4 tensors, the limit is 1"),
        ("MAX_CHUNKS", "2 chunks"),
        ("MAX_FILES", "3 weight files"),
        ("MAX_EMPTY_FOLDERS", "1 empty folders"),
        ("MAX_MANIFEST_BYTES", "bytes of manifest"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(manifest_module, limit, 1 if what[0] not in "1b" else 0)
            with pytest.raises(LimitExceeded, match=what):
                render_manifest(sample())


@pytest.mark.parametrize("limit", ["MAX_STRUCTURE_RATIO", "_VALUES_EXTRA"])
def test_a_structure_that_is_too_much_for_its_manifest_is_stored_plain(
    limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"layers.{n}.weight" for n in range(500)]
    rows = tuple(Row("f", name, spec((5,), A), None, 0, ()) for name in names)
    one = Manifest(Base(None), Target(False, (WeightFile("f", C, None, None),), (), ()), rows, {})
    usual = render_manifest(one)
    monkeypatch.setattr(manifest_module, "MAX_STRUCTURE_EXTRA", 0)
    monkeypatch.setattr(manifest_module, limit, 1 if limit == "MAX_STRUCTURE_RATIO" else -2500)
    with pytest.raises(LimitExceeded):
        parse_manifest(usual, 0)
    plain = render_manifest(one)
    assert len(plain) > len(usual)
    assert int.from_bytes(plain[:4], "little") == int.from_bytes(plain[4:8], "little")
    assert parse_manifest(plain, 0) == one


Structure = dict[str, Any]
Alter = Callable[[Structure], object]


def columns(**changes: Any) -> Alter:
    """Return what replaces columns of tensors, or of chunks."""

    def alter(m: Structure) -> None:
        for name, column in changes.items():
            part = "chunks" if name in m["chunks"] and name != "codings" else "tensors"
            part = "chunks" if name == "codings" else part
            m[part][name] = column

    return alter


def target(**changes: Any) -> Alter:
    return lambda m: m["target"].update(changes)


def weight(number: int, place: int, value: Any) -> Alter:
    return lambda m: m["target"]["weight_files"][number].__setitem__(place, value)


def side(number: int, place: int, value: Any) -> Alter:
    return lambda m: m["target"]["side_files"][number].__setitem__(place, value)


def layout(place: int, value: Any, number: int = 0) -> Alter:
    return lambda m: m["layouts"][number].__setitem__(place, value)


def last_is_first(value: dict[str, Any]) -> None:
    items = list(value.items())
    value.clear()
    value.update([items[-1], *items[:-1]])


CORRUPT: dict[str, Alter] = {
    "missing member": lambda m: m.pop("codings"),
    "missing inner member": lambda m: m["base"].pop("id"),
    "further member": lambda m: m.update(x=1),
    "further inner member": lambda m: m["tensors"].update(x=[]),
    "members in another order": last_is_first,
    "inner members in another order": lambda m: last_is_first(m["target"]),
    "list for an object": lambda m: m.update(base=[]),
    "object for a list": lambda m: m.update(layouts={}),
    "requires a number": lambda m: m.update(requires=[1]),
    "number for a string": lambda m: m["base"].update(id=1),
    "n_unused negative": lambda m: m["base"].update(n_unused=-1),
    "n_unused true": lambda m: m["base"].update(n_unused=True),
    "n_unused too large": lambda m: m["base"].update(n_unused=1 << 63),
    "base file leaves the folder": lambda m: m["base"].update(files=["../x"]),
    "kind of another type": target(kind=True),
    "digests a number": target(digests=1),
    "digests missing": target(digests=False),
    "metadata beside a stored header": weight(1, 2, ["stored", 20, 9, None]),
    "canonical header without metadata": weight(0, 2, ["canonical"]),
    "header without a kind": weight(0, 2, []),
    "metadata that is no string": weight(0, 2, ["canonical", [["a", 1]]]),
    "metadata of one": weight(0, 2, ["canonical", [["a"]]]),
    "metadata an object": weight(0, 2, ["canonical", {"a": "b"}]),
    "metadata key twice": weight(0, 2, ["canonical", [["a", "b"], ["a", "b"]]]),
    "stored header larger than it is": weight(1, 2, ["stored", 8, 9]),
    "stored header of no bytes": weight(1, 2, ["stored", 20, 0]),
    "stored header of minus one": weight(1, 2, ["stored", 20, -1]),
    "n_tensors too small": weight(0, 1, 1),
    "n_tensors negative": weight(0, 1, -1),
    "path leaves the folder": weight(0, 0, "../a.safetensors"),
    "weight file without the suffix": weight(0, 0, "a.bin"),
    "side file with the suffix": side(1, 0, "x.safetensors"),
    "paths equal": weight(0, 0, "b.safetensors"),
    "paths equal without case": weight(0, 0, "B.safetensors"),
    "file in an empty folder": weight(0, 0, "empty/a.safetensors"),
    "side files not sorted": lambda m: m["target"]["side_files"].reverse(),
    "side file of two": lambda m: m["target"]["side_files"][0].pop(),
    "side file of minus one byte": side(1, 1, -1),
    "side file stored in minus two": side(0, 2, -2),
    "side file stored larger": side(0, 2, 8),
    "side file stored in nothing": side(0, 2, 0),
    "folders twice": target(empty_folders=["e", "e"]),
    "folders not sorted": target(empty_folders=["f", "e"]),
    "folder not a path": target(empty_folders=[""]),
    "file with side files": target(kind="file"),
    "layout of three": lambda m: m["layouts"][0].pop(),
    "bits of a known dtype": layout(1, 32),
    "element of a known dtype": layout(2, "i2"),
    "shape of a string": layout(3, ["1"]),
    "shape negative": layout(3, [-1]),
    "shape true": layout(3, [True]),
    "part of a byte": lambda m: m["layouts"].append(["F4", 4, "i1", [1]]),
    "part of an element": lambda m: m["layouts"].append(["X", 8, "i2", [1]]),
    "name twice": columns(names=["w", "w", "w", "new"]),
    "reserved name": columns(names=["w", "__metadata__", "w", "new"]),
    "name a number": columns(names=["w", 1, "w", "new"]),
    "too few layouts": columns(layouts=[0, 1, 2]),
    "no such layout": columns(layouts=[0, 1, 2, 5]),
    "layout negative": columns(layouts=[0, 1, 2, -1]),
    "no such base file": columns(base_files=[0, 0, 1, -1]),
    "base file of minus two": columns(base_files=[0, 0, 0, -2]),
    "base name of a row without a base": columns(base_names=[[3, "x"]]),
    "base name of no row": columns(base_names=[[4, "x"]]),
    "base names not ascending": columns(base_names=[[1, "old"], [0, "x"]]),
    "base names twice": columns(base_names=[[1, "old"], [1, "old"]]),
    "base name that is the own": columns(base_names=[[1, "same"]]),
    "base name a number": columns(base_names=[[1, 2]]),
    "base name of three": columns(base_names=[[1, "old", 1]]),
    "base layout that is the own": columns(base_layouts=[[0, 0], [2, 3]]),
    "no such base layout": columns(base_layouts=[[2, 5]]),
    "keeps as much as it can": columns(keep=[[2, 4]]),
    "keeps more than the target": columns(keep=[[2, 5]]),
    "keeps of another dtype": lambda m: (
        m["layouts"].append(["F16", 16, "f2", [6]]),
        columns(base_layouts=[[2, 5]], keep=[[2, 0]])(m),
    ),
    "keeps of no base": columns(keep=[[2, 1], [3, 0]]),
    "too few n_chunks": columns(n_chunks=[2, 0, 0]),
    "n_chunks too small": columns(n_chunks=[1, 0, 0, 0]),
    "n_chunks of another row": columns(n_chunks=[0, 2, 0, 0]),
    "n_chunks right modulo 2^64": columns(n_chunks=[1 << 62, 1 << 62, 1 << 62, (1 << 62) + 2]),
    "coding of three": lambda m: m["codings"][0].pop(),
    "coding with classes of two": lambda m: m["codings"][1].__setitem__(3, 2),
    "coding with classes true": lambda m: m["codings"][1].__setitem__(3, True),
    "classes of gaps and planes": lambda m: m["codings"][0].__setitem__(3, 1),
    "too few spans": columns(spans=[100]),
    "chunks overlap": columns(starts=[3, 102]),
    "chunks do not ascend": columns(starts=[103, 3]),
    "chunk outside": columns(starts=[3, 204]),
    "chunk of too many elements": columns(spans=[100, (1 << 24) + 1]),
    "chunk without elements": columns(spans=[100, 0], nnz=[4, 0]),
    "chunk without positions": columns(nnz=[0, 5]),
    "chunk of too many positions": columns(nnz=[101, 5]),
    "nnz true": columns(nnz=[True, 5]),
    "no such coding": columns(codings=[0, 2]),
    "touched of two": columns(touched=[2, 0]),
    "touched digests missing": columns(touched=[1, 1]),
    "touched digests too many": columns(touched=[0, 0]),
    "raw size missing": columns(raw=[4, 6]),
    "raw size too many": columns(raw=[4, 6, 7, 1]),
    "raw size negative": columns(raw=[4, 6, -7]),
    "stored size missing": columns(stored=[4, 4, 4, 6]),
    "stored size too many": columns(stored=[4, 4, 4, 6, 5, 0]),
    "stored larger than raw": columns(stored=[5, 4, 4, 6, 4]),
    "stored in nothing": columns(stored=[0, 4, 4, 6, 9]),
    "index stream too short": columns(raw=[3, 6, 7]),
    "index stream too long": columns(raw=[5, 6, 7]),
    "payload larger": columns(stored=[4, 4, 4, 6, 4]),
}
UNSUPPORTED: dict[str, Alter] = {
    "requires something": lambda m: m.update(requires=["rotation"]),
    "unknown kind": target(kind="tar"),
    "unknown header kind": weight(0, 2, ["other"]),
    "unknown element type": lambda m: m["layouts"].append(["X", 8, "u1", [1]]),
    "unknown value encoding": lambda m: m["codings"][0].__setitem__(0, "xor"),
    "unknown index encoding": lambda m: m["codings"][0].__setitem__(1, "gaps16"),
    "unknown value packing": lambda m: m["codings"][0].__setitem__(2, "bytes"),
}
BEYOND: dict[str, Alter] = {
    "65 dimensions": layout(3, [1] * 65),
    "2^63 bits": layout(3, [1 << 59]),
    "2^63 bits in all": lambda m: (
        m["layouts"].append(["U8", 8, "i1", [1 << 59]]),
        columns(layouts=[0, 1, 5, 5], base_layouts=[[2, 3]], keep=[])(m),
    ),
    "1025 bits a value": lambda m: m["layouts"].append(["X", 1025, "i1", [8]]),
    "long name": columns(names=["é" * 513, "same", "w", "new"]),
    "long base name": columns(base_names=[[1, "é" * 513]]),
    "large carried file": side(0, 1, (1 << 27) + 1),
    "large stored header": weight(1, 2, ["stored", (1 << 27) + 1, 9]),
    "file that expands too much": side(0, 1, 64 * 7 + 1025),
    "header that expands too much": weight(1, 2, ["stored", 64 * 9 + 1025, 9]),
    "many weight files": target(weight_files=[0] * ((1 << 16) + 1)),
    "many side files": target(side_files=[0] * ((1 << 16) + 1)),
    "many empty folders": target(empty_folders=["x"] * ((1 << 12) + 1)),
    "many base files": lambda m: m["base"].update(files=["x"] * ((1 << 16) + 1)),
    "many rows": columns(names=["x"] * ((1 << 19) + 1)),
    "many chunks": columns(starts=[0] * ((1 << 20) + 1)),
}


def parse_altered(alter: Alter) -> Manifest:
    value = json.loads(STRUCTURE)
    alter(value)
    return parse(compact_json(value))


@pytest.mark.parametrize("name", CORRUPT)
def test_contradictions_are_refused(name: str) -> None:
    with pytest.raises(Corrupt):
        parse_altered(CORRUPT[name])


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unknown_things_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedFeature):
        parse_altered(UNSUPPORTED[name])


@pytest.mark.parametrize("name", BEYOND)
def test_limits_are_held(name: str) -> None:
    with pytest.raises(LimitExceeded):
        parse_altered(BEYOND[name])


@pytest.mark.parametrize(
    "alter",
    [
        lambda m: None,
        side(0, 1, 64 * 7 + 1024),
        side(1, 1, 1 << 40),
        weight(1, 2, ["stored", 64 * 9 + 1024, 9]),
        columns(names=["é" * 512, "same", "w", "new"]),
        columns(keep=[[0, 0], [2, 0]]),
        columns(keep=[]),
        layout(3, [1 << 62, 0, 1 << 62], number=4),
        lambda m: m["layouts"].append(["X", 1024, "f8", [1] * 64]),
        lambda m: m["base"].update(id=None, n_unused=(1 << 63) - 1),
        columns(starts=[0, 200], spans=[200, 100]),
        target(empty_folders=[]),
    ],
)
def test_what_is_just_allowed(alter: Alter) -> None:
    parse_altered(alter)


@pytest.mark.parametrize(
    "raw",
    [b"", b"null", b"[]", b"\xff", b"{}", b'{"requires":[],"requires":[]}', b"[" * 10_000, b"NaN"],
)
def test_no_structure_at_all(raw: bytes) -> None:
    with pytest.raises(Corrupt):
        parse(raw)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('{"requires"', '{ "requires"'),
        ('"kind"', '\n"kind"'),
        ("}}", "}} "),
        ('"a.safetensors"', '"\\u0061.safetensors"'),
        ('"x/y"', '"x\\/y"'),
        ('"é"', '"\\u00e9"'),
        ('"é"', '"\\u001F"'),
        ('"n_unused":2', '"n_unused":2.0'),
        ('"n_unused":2', '"n_unused":2e0'),
        ('"n_unused":2', '"n_unused":-0'),
        ('"n_unused":2', '"n_unused":2,"n_unused":2'),
        ('"n_unused":2', '"n_unused":Infinity'),
        ('"n_unused":2', '"n_unused":' + "9" * 5000),
        ('"org/model@4f1e"', '"\\ud800"'),
    ],
)
def test_structure_has_one_spelling(old: str, new: str) -> None:
    assert old in STRUCTURE
    with pytest.raises(Corrupt):
        parse(STRUCTURE.replace(old, new, 1).encode())


def test_values_are_as_many_as_a_manifest_of_its_size_may_have() -> None:
    value = json.loads(STRUCTURE)
    value["chunks"]["raw"] += [0] * 300_000
    with pytest.raises(LimitExceeded, match="values in its structure"):
        parse(compact_json(value))  # plain it has 600 kB; a third of that and 2^16 are too few


def test_digests_are_as_many_as_called_for() -> None:
    structure = STRUCTURE.encode()
    parse(structure)
    for digests in (DIGESTS[:-1], DIGESTS + b"\0", b""):
        with pytest.raises(Corrupt, match="digest"):
            parse(structure, digests=digests)


def test_payload_is_as_long_as_called_for() -> None:
    raw = joined(STRUCTURE.encode())
    for n in (PAYLOAD_BYTES - 1, PAYLOAD_BYTES + 1):
        with pytest.raises(Corrupt, match="expected 39 by the manifest"):
            parse_manifest(raw, n)


@pytest.mark.parametrize(
    ("notes", "info"),
    [
        (b"{}", {}),
        (b'{"more":[1.5,null],"info":{"a":1}}', {"a": 1}),
        (b' {\n"info" : {"\\u0061":-1e3}}', {"a": -1000}),
        (b'{"info":"x"}', {}),
        (b'{"info":{"a":18446744073709551616,"b":-0}}', {"a": 1 << 64, "b": 0}),
        (b'{"info":{"a":1e999},"x":' + b"9" * 9999 + b"}", {"a": "1e999"}),
        (b'{"info":{"x":' + b"[" * 62 + b"]" * 62 + b"}}", ...),
    ],
)
def test_notes_may_hold_anything(notes: bytes, info: Any) -> None:
    found = parse(STRUCTURE.encode(), notes).info
    assert info is ... or found == info


@pytest.mark.parametrize(
    "notes",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b'{"a":1,"a":1}',
        b'{"x":{"a":1,"a":1}}',
        b'{"a":NaN}',
        b'{"a":"\\ud800"}',
        b'{"a":"\xff"}',
        b'{"x":' + b"[" * 64 + b"]" * 64 + b"}",
    ],
)
def test_notes_are_a_strict_object(notes: bytes) -> None:
    with pytest.raises(Corrupt):
        parse(STRUCTURE.encode(), notes)


def sized(*sizes: int, raw: bytes | None = None) -> bytes:
    head = b"".join(size.to_bytes(4, "little") for size in sizes)
    return head + (joined(STRUCTURE.encode()) if raw is None else raw)[16:]


def test_sizes_of_texts() -> None:
    raw = joined(STRUCTURE.encode())
    n, stored, n_notes, stored_notes = (
        int.from_bytes(raw[at : at + 4], "little") for at in range(0, 16, 4)
    )
    parse_manifest(sized(n, stored, n_notes, stored_notes), PAYLOAD_BYTES)
    wrong: list[tuple[tuple[int, int, int, int], type[FormatError]]] = [
        ((n, 1 << 31, n_notes, stored_notes), Corrupt),
        ((n - 1, stored, n_notes, stored_notes), Corrupt),
        ((stored, stored, n_notes, stored_notes), Corrupt),
        ((n, 0, n_notes, stored_notes), Corrupt),
        ((n, stored, n_notes, 0), Corrupt),
        ((n, stored, n_notes, stored_notes + 1), Corrupt),
        ((4 * len(raw) + (1 << 19) + 1, stored, n_notes, stored_notes), LimitExceeded),
        ((n, stored, (1 << 20) + 1, stored_notes), LimitExceeded),
    ]
    for sizes, error in wrong:
        with pytest.raises(error):
            parse_manifest(sized(*sizes), PAYLOAD_BYTES)
    for end in range(16):
        with pytest.raises(Corrupt):
            parse_manifest(raw[:end], PAYLOAD_BYTES)


def test_every_byte_counts() -> None:
    """The digest of the manifest guards it; besides, most changes are refused, and none escapes."""
    raw = joined(STRUCTURE.encode())
    for position in range(len(raw) - len(DIGESTS)):
        damaged = bytearray(raw)
        damaged[position] ^= 1 << position % 8
        try:
            parsed = parse_manifest(bytes(damaged), PAYLOAD_BYTES)
        except FormatError:
            continue
        assert render_manifest(parsed) != render_manifest(sample())
