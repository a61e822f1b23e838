"""The manifest: exact JSON out, every rule of FORMAT §12 held on the way in."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from sparsedelta.codecs.chunk import Chunk
from sparsedelta.dtypes import DTYPES
from sparsedelta.errors import Corrupt, LimitExceeded, UnsupportedFeature
from sparsedelta.format.delta import Delta
from sparsedelta.format.manifest import Manifest, parse_manifest, render_manifest
from sparsedelta.format.records import (
    Base,
    Change,
    SideFile,
    Target,
    TensorDelta,
    TensorSpec,
    WeightFile,
)
from sparsedelta.format.spool import SpoolPayload

A, B = "a1" * 16, "b2" * 16
F = "f0" * 32


def spec(shape: tuple[int, ...], digest: str) -> TensorSpec:
    return TensorSpec(DTYPES["BF16"], shape, bytes.fromhex(digest))


def sample() -> Delta:
    """Return a delta with one of everything."""
    change = Change(
        300,
        "ulp",
        (b"\x01" * 8, b"\x02" * 8),
        (Chunk(0, 4, "gap8", 5, (14, 13, 13)),),
    )
    return Delta(
        Base("org/model@4f1e", bytes.fromhex(F)),
        Target(
            bytes.fromhex(F),
            True,
            (
                WeightFile("a.safetensors", 1, {"format": "pt"}, False),
                WeightFile("b.safetensors", 2, None, True),
            ),
            (SideFile("config.json", 7, bytes(32), True), SideFile("x/y", 0, bytes(32), False)),
            ("empty",),
        ),
        (
            TensorDelta("w", spec((300,), A), spec((300,), B), change),
            TensorDelta("same", spec((2,), A), spec((2,), A), None),
            TensorDelta("new", None, spec((0,), A), Change(0, "target", None, ())),
            TensorDelta("gone", spec((), A), None, None),
        ),
        {"lr": 1e-3, "é": [None, True, -5]},
        SpoolPayload(),
    )


def render(delta: Delta, payload_digest: bytes) -> bytes:
    return render_manifest(
        Manifest(delta.base, delta.target, delta.tensors, delta.info, payload_digest)
    )


def manifest() -> dict[str, Any]:
    value: dict[str, Any] = json.loads(render(sample(), bytes(32)))
    return value


def test_exact_json() -> None:
    zeros = "00" * 32
    assert render(sample(), bytes(32)).decode() == (
        f'{{"base":{{"id":"org/model@4f1e","fingerprint":"{F}"}},'
        f'"target":{{"kind":"folder","fingerprint":"{F}","weight_files":['
        '{"path":"a.safetensors","n_tensors":1,"header":"canonical","metadata":{"format":"pt"}},'
        '{"path":"b.safetensors","n_tensors":2,"header":"stored","metadata":null}],"side_files":['
        f'{{"path":"config.json","n_bytes":7,"digest":"{zeros}","carried":true}},'
        f'{{"path":"x/y","n_bytes":0,"digest":"{zeros}","carried":false}}],'
        '"empty_folders":["empty"]},"tensors":['
        f'{{"name":"w","base":{{"dtype":"BF16","shape":[300],"digest":"{A}"}},'
        f'"target":{{"dtype":"BF16","shape":[300],"digest":"{B}"}},'
        '"delta":{"keep":300,"values":"ulp","touched":["0101010101010101","0202020202020202"],'
        '"chunks":[[0,4,"gap8",5,[14,13,13]]]}},'
        f'{{"name":"same","base":{{"dtype":"BF16","shape":[2],"digest":"{A}"}},'
        f'"target":{{"dtype":"BF16","shape":[2],"digest":"{A}"}},"delta":null}},'
        f'{{"name":"new","base":null,"target":{{"dtype":"BF16","shape":[0],"digest":"{A}"}},'
        '"delta":{"keep":0,"values":"target","touched":null,"chunks":[]}},'
        f'{{"name":"gone","base":{{"dtype":"BF16","shape":[],"digest":"{A}"}},'
        '"target":null,"delta":null}],'
        f'"info":{{"lr":0.001,"é":[null,true,-5]}},"payload_digest":"{zeros}"}}'
    )


def test_what_is_written_is_read() -> None:
    delta = sample()
    parsed = parse_manifest(render(delta, b"\x07" * 32))
    assert (parsed.base, parsed.target, parsed.tensors) == (delta.base, delta.target, delta.tensors)
    assert parsed.info == delta.info
    assert parsed.payload_digest == b"\x07" * 32
    again = Delta(parsed.base, parsed.target, parsed.tensors, parsed.info, delta.payload)
    assert render(again, parsed.payload_digest) == render(delta, b"\x07" * 32)


def test_names_beyond_the_limit_are_not_written() -> None:
    delta = sample()
    long = replace(delta.tensors[0], name="é" * 32_768)
    with pytest.raises(LimitExceeded, match="65536 bytes of tensor name"):
        render(replace(delta, tensors=(long, *delta.tensors[1:])), bytes(32))


def test_unknown_target_and_single_file() -> None:
    delta = sample()
    row = TensorDelta(
        "w", spec((300,), A), replace(spec((300,), B), digest=None), delta.tensors[0].change
    )
    target = Target(None, False, (WeightFile("any name", 1, None, False),), (), ())
    delta = Delta(Base(None, bytes(32)), target, (row,), {}, delta.payload)
    parsed = parse_manifest(render(delta, bytes(32)))
    assert (parsed.target, parsed.tensors, parsed.base) == (target, (row,), delta.base)


Alter = Callable[[dict[str, Any]], object]

CORRUPT: dict[str, Alter] = {
    "missing member": lambda m: m.pop("info"),
    "missing inner member": lambda m: m["base"].pop("id"),
    "info is a list": lambda m: m.update(info=[]),
    "number for a string": lambda m: m["base"].update(id=1),
    "upper-case hex": lambda m: m["base"].update(fingerprint=F.upper()),
    "no base fingerprint": lambda m: m["base"].update(fingerprint=None),
    "kind of another type": lambda m: m["target"].update(kind=True),
    "metadata beside a stored header": lambda m: weight(m, 1).update(metadata={}),
    "metadata that is no string": lambda m: weight(m, 0).update(metadata={"a": 1}),
    "n_tensors too small": lambda m: weight(m, 0).update(n_tensors=0),
    "n_tensors negative": lambda m: weight(m, 0).update(n_tensors=-1),
    "n_tensors a float": lambda m: weight(m, 0).update(n_tensors=1.0),
    "path leaves the folder": lambda m: weight(m, 0).update(path="../a"),
    "paths equal": lambda m: weight(m, 0).update(path="config.json"),
    "file within a file": lambda m: weight(m, 0).update(path="config.json/x"),
    "file in an empty folder": lambda m: weight(m, 0).update(path="empty/x"),
    "side files not sorted": lambda m: m["target"]["side_files"].reverse(),
    "folders twice": lambda m: m["target"].update(empty_folders=["e", "e"]),
    "folder not a path": lambda m: m["target"].update(empty_folders=[""]),
    "file with side files": lambda m: m["target"].update(kind="file"),
    "name twice": lambda m: row(m, 1).update(name="w"),
    "reserved name": lambda m: row(m, 1).update(name="__metadata__"),
    "neither base nor target": lambda m: row(m, 3).update(base=None),
    "removed row not last": lambda m: m["tensors"].insert(0, m["tensors"].pop()),
    "base digest null": lambda m: row(m, 3)["base"].update(digest=None),
    "target digest null alone": lambda m: row(m, 0)["target"].update(digest=None),
    "fingerprint null alone": lambda m: m["target"].update(fingerprint=None),
    "delta of an unchanged tensor": lambda m: row(m, 1).update(delta=row(m, 2)["delta"]),
    "no delta of a changed tensor": lambda m: row(m, 0).update(delta=None),
    "delta of a removed tensor": lambda m: row(m, 3).update(delta=row(m, 2)["delta"]),
    "keeps more than the base": lambda m: change(m).update(keep=301),
    "keeps of another dtype": lambda m: row(m, 0)["base"].update(dtype="F16"),
    "keeps of no base": lambda m: row(m, 0).update(base=None),
    "part of a byte": lambda m: row(m, 3)["base"].update(dtype="F4"),
    "one touched digest": lambda m: change(m)["touched"].pop(),
    "three touched digests": lambda m: change(m)["touched"].append("00" * 8),
    "chunk of four": lambda m: chunk(m).pop(),
    "chunk twice": lambda m: change(m)["chunks"].append(chunk(m)),
    "chunk outside": lambda m: chunk(m).__setitem__(0, 1),
    "chunk without positions": lambda m: chunk(m).__setitem__(1, 0),
    "chunk of too many": lambda m: chunk(m).__setitem__(1, 301),
    "index stream too short": lambda m: chunk(m).__setitem__(3, 3),
    "index stream too long": lambda m: chunk(m).__setitem__(3, 6),
    "streams of another width": lambda m: chunk(m)[4].append(1),
    "index stream left out": lambda m: chunk(m)[4].__setitem__(0, 0),
    "true for a number": lambda m: chunk(m).__setitem__(1, True),
}
UNSUPPORTED: dict[str, Alter] = {
    "further member": lambda m: m.update(x=1),
    "further inner member": lambda m: change(m).update(x=1),
    "unknown kind": lambda m: m["target"].update(kind="tar"),
    "unknown header kind": lambda m: weight(m, 0).update(header="other"),
    "unknown dtype": lambda m: row(m, 0)["base"].update(dtype="bf16"),
    "unknown index encoding": lambda m: chunk(m).__setitem__(2, "gap32"),
    "unknown value encoding": lambda m: change(m).update(values="xor"),
}
BEYOND: dict[str, Alter] = {
    "65 dimensions": lambda m: row(m, 0)["base"].update(shape=[1] * 65),
    "2^63 bits": lambda m: row(m, 0)["base"].update(shape=[1 << 59]),
    "long name": lambda m: row(m, 0).update(name="é" * 32_768),
    "large carried file": lambda m: m["target"]["side_files"][0].update(n_bytes=(1 << 27) + 1),
}


def weight(m: dict[str, Any], number: int) -> Any:
    return m["target"]["weight_files"][number]


def row(m: dict[str, Any], number: int) -> Any:
    return m["tensors"][number]


def change(m: dict[str, Any]) -> Any:
    return row(m, 0)["delta"]


def chunk(m: dict[str, Any]) -> Any:
    return change(m)["chunks"][0]


def parse_altered(alter: Alter) -> None:
    value = manifest()
    alter(value)
    parse_manifest(json.dumps(value).encode())


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
        lambda m: m["target"]["side_files"][0].update(n_bytes=1 << 27),
        lambda m: m["target"]["side_files"][1].update(n_bytes=1 << 40),
        lambda m: row(m, 0).update(name="é" * 32_767),
        lambda m: row(m, 0)["delta"].update(keep=0),
        lambda m: row(m, 2)["target"].update(shape=[1 << 62, 0, 1 << 62]),
        lambda m: m.update(info={"deep": json.loads("[" * 61 + "]" * 61)}),
    ],
)
def test_what_is_just_allowed(alter: Alter) -> None:
    parse_altered(alter)


@pytest.mark.parametrize("raw", [b"", b"null", b"[]", b"\xff", b'{"base":1,"base":1}'])
def test_no_manifest_at_all(raw: bytes) -> None:
    with pytest.raises(Corrupt):
        parse_manifest(raw)
