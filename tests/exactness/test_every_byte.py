"""Every byte of a delta counts: whichever is changed, cut off or added, load, verify or apply refuses it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from helpers import Raw, assert_same_files, noise, of_array, write, write_file
from vector_source.writer import container_header

import sparsedelta
from sparsedelta import Delta
from sparsedelta.errors import BaseMismatch, Corrupt, FormatError, SparseDeltaError, Truncated
from sparsedelta.format.delta import read_delta
from sparsedelta.format.manifest import read_text
from sparsedelta.format.records import Row


class InMemory:
    """A file's bytes as a source."""

    name = "delta.sd"

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.n_bytes = len(content)

    def read(self, offset: int, n_bytes: int) -> bytes:
        return self.content[offset : offset + n_bytes]

    def close(self) -> None:
        pass


def loaded(content: bytes) -> Delta:
    return read_delta(InMemory(content))


@dataclass(frozen=True)
class Case:
    """Base, target and the bytes of their delta."""

    base: Path
    target: Path
    content: bytes

    @property
    def manifest_at(self) -> tuple[int, int]:
        """Where the manifest begins and ends."""
        n = int.from_bytes(self.content[:8], "little")
        fields = json.loads(self.content[8 : 8 + n])
        return 8 + n, 8 + n + fields["manifest"]["shape"][0]

    def with_manifest(self, manifest: bytes) -> bytes:
        """Return the delta with another manifest, which has its digest."""
        payload = self.content[self.manifest_at[1] :]
        header = container_header(manifest, len(payload))
        return len(header).to_bytes(8, "little") + header + manifest + payload


def small_steps() -> tuple[Raw, Raw]:
    """Return a tensor before and after steps so small that classes pay."""
    draw = np.random.default_rng(7)
    before = (draw.normal(0, 0.02, (64, 1 << 9)).astype("<f4").view("<u4") >> 16).astype("<u2")
    likely = np.minimum(0.8, 0.02 * 2.0 ** (121 - (before >> 7 & 255).astype(float)))
    after = before + (draw.random(before.shape) < likely).astype("<u2")
    return of_array("BF16", before), of_array("BF16", after)


def spaced(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields).encode()


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Return a delta with something of everything."""
    root = tmp_path_factory.mktemp("every byte")
    w, v = noise("F32", 40), noise("BF16", 10, 4)
    before, after = small_steps()
    long = Raw("U8", (300,), b"\1" * 150 + bytes(150))
    base = {"w": w, "v": v, "same": w, "classes": before, "long": long}
    target = {
        "w": w.changed(0, 90, 159),
        "v": Raw("BF16", (12, 4), v.changed(5).data + bytes(10) + b"\1" * 6),
        "same": w,
        "classes": after,
        "new": noise("I64", 3),
        "long": long.with_data(b"\2" * 300),
        "empty": noise("F32", 0),
    }
    for name, tensors in (("base", base), ("target", target)):
        write_file(root / name / "a.safetensors", tensors, {"format": "pt"})
        write_file(root / name / "b.safetensors", {"x": w if name == "base" else v}, spell=spaced)
        write(root / name / "config.json", name)
        write(root / name / "long.txt", name * 200)
        write(root / name / "same.txt", "same")
    with sparsedelta.diff(root / "base", root / "target", info={"x": 1}) as delta:
        delta.save(root / "delta.sd")
    case = Case(root / "base", root / "target", (root / "delta.sd").read_bytes())
    codings = {(c.coding.values, c.coding.classes) for r in delta.tensors for c in r.chunks}
    assert {("ulp", False), ("ulp", True), ("target", False)} <= codings
    return case


def test_the_case_is_right(case: Case, tmp_path: Path) -> None:
    delta = loaded(case.content)
    sparsedelta.verify(delta, base=case.base, target=case.target)
    sparsedelta.apply(case.base, delta, tmp_path / "out")
    assert_same_files(case.target, tmp_path / "out")


def flipped(content: bytes, position: int, mask: int) -> bytes:
    changed = bytearray(content)
    changed[position] ^= mask
    return bytes(changed)


def test_every_byte_of_header_and_manifest_is_refused_at_once(case: Case) -> None:
    for position in range(case.manifest_at[1]):
        for mask in (1 << position % 8, 0xFF):
            with pytest.raises(FormatError):
                loaded(flipped(case.content, position, mask))


def test_every_byte_of_the_payload_is_refused_when_it_is_read(case: Case) -> None:
    """Of long parts some bytes stand for the others: what guards them is one digest."""
    end = case.manifest_at[1]
    for _, offset, size in stored_parts(loaded(case.content)):
        step = 1 + size // 150
        for position in {*range(offset, offset + size, step), offset + size - 1}:
            mask = 1 << position % 8
            with pytest.raises(FormatError):
                sparsedelta.verify(loaded(flipped(case.content, end + position, mask)))


def test_every_truncation_is_refused(case: Case) -> None:
    for n in range(len(case.content)):
        with pytest.raises(Truncated):
            loaded(case.content[:n])


def test_bytes_that_follow_are_refused(case: Case) -> None:
    for more in (b"\0", b" " * 8, case.content):
        with pytest.raises(Corrupt):
            loaded(case.content + more)


def stored_parts(delta: Delta) -> Iterator[tuple[str, int, int]]:
    """Yield name, offset and size of each part of the payload."""
    target = delta.target
    places = {file.path: file.stored for file in target.side_files}
    places |= {file.path: file.stored for file in target.weight_files}
    for path, place in places.items():
        if place:
            yield path, place.offset, place.stored_bytes
    for row in delta.tensors:
        for chunk in row.chunks:
            yield f"{row.name}@{chunk.start}", chunk.offset, chunk.stored_bytes


def test_apply_checks_every_part_of_the_payload(case: Case, tmp_path: Path) -> None:
    end = case.manifest_at[1]
    parts = list(stored_parts(loaded(case.content)))
    assert sum(size for *_, size in parts) == len(case.content) - end
    assert len(parts) > 8
    for name, offset, size in parts:
        for position in {offset, offset + size // 2, offset + size - 1}:
            changed = flipped(case.content, end + position, 0x10)
            for verify in ("full", "touched", "none"):
                with pytest.raises(FormatError):
                    sparsedelta.apply(case.base, loaded(changed), tmp_path / "out", verify=verify)
                assert not (tmp_path / "out").exists(), name


def digests(case: Case, delta: Delta) -> Iterator[tuple[str, int]]:
    """Yield what each digest of the manifest is of, and where it lies in it."""
    first, end = case.manifest_at
    manifest = case.content[first:end]
    at = 16 + sum(int.from_bytes(manifest[i : i + 4], "little") for i in (4, 12))
    target = delta.target
    kinds = [(f"header {f.path}", 16) for f in target.weight_files]
    kinds += [(f"side file {f.path}", 32) for f in target.side_files]
    kinds += [(f"base {row.name}", 16) for row in delta.tensors if row.base]
    known = all(row.target.digest for row in delta.tensors)
    kinds += [
        (f"target {row.name}", 16)
        for row in delta.tensors
        if row.base is None or (known and not row.is_copied)
    ]
    chunks = [(row, chunk) for row in delta.tensors for chunk in row.chunks]
    kinds += [(f"chunk {row.name}", 16) for row, _ in chunks]
    kinds += [(f"touched {row.name}", 16) for row, chunk in chunks if chunk.touched]
    for kind, size in kinds:
        yield kind, at
        yield kind, at + size // 2 - 1  # of touched digests, the last byte of those before
        yield kind, at + size - 1
        at += size
    assert at == len(manifest)


def test_every_digest_is_held_against_what_it_is_of(case: Case, tmp_path: Path) -> None:
    """A delta whose author gave one wrong digest, and all others right."""
    first, end = case.manifest_at
    delta = loaded(case.content)
    proven = {row.name for row in delta.tensors if proves_base(row)}
    for kind, at in digests(case, delta):
        what, name = kind.split(" ", 1)
        if what == "side":
            what, name = "side file", kind.removeprefix("side file ")
        changed = case.with_manifest(flipped(case.content[first:end], at, 0x04))
        error: type[SparseDeltaError] = Corrupt
        if what == "base" or kind == "side file same.txt":
            error = BaseMismatch
        with pytest.raises(error):
            sparsedelta.verify(loaded(changed), base=case.base)
        if what == "base" and name in proven:
            continue  # apply need not compare it: only this base becomes this target
        with pytest.raises(error):
            sparsedelta.apply(case.base, loaded(changed), tmp_path / "out")
        assert not (tmp_path / "out").exists(), kind
    assert {"w"} <= proven < {row.name for row in delta.tensors}


def proves_base(row: Row) -> bool:
    return (
        row.keeps_all
        and not row.is_copied
        and all(
            c.coding.values == "ulp" and (c.touched or not c.coding.classes) for c in row.chunks
        )
    )


def test_without_target_digests_touched_digests_are_held(case: Case, tmp_path: Path) -> None:
    with sparsedelta.diff(case.base, case.target) as delta:
        rows = tuple(
            row
            if row.is_copied or row.base is None
            else replace(row, target=row.target.with_digest(None))
            for row in delta.tensors
        )
        replace(delta, tensors=rows).save(tmp_path / "delta.sd")
    unknown = Case(case.base, case.target, (tmp_path / "delta.sd").read_bytes())
    found = loaded(unknown.content)
    assert found.target_fingerprint is None
    assert sparsedelta.verify(found, base=case.base, target=case.target).base_checked
    sparsedelta.apply(case.base, found, tmp_path / "right")
    assert_same_files(case.target, tmp_path / "right")
    first, end = unknown.manifest_at
    n = 0
    for kind, at in digests(unknown, found):
        if kind.split()[0] in ("base", "touched", "target"):
            changed = unknown.with_manifest(flipped(unknown.content[first:end], at, 0x04))
            for check in (
                lambda delta: sparsedelta.verify(delta, base=case.base),
                lambda delta: sparsedelta.apply(case.base, delta, tmp_path / "out"),
            ):
                with pytest.raises((BaseMismatch, Corrupt)):
                    check(loaded(changed))
            n += 1
    assert n > 20
    assert not (tmp_path / "out").exists()


def test_stored_texts_are_what_their_digest_says(case: Case) -> None:
    """What the digests are of, computed here and not by the package."""
    delta, payload = loaded(case.content), case.content[case.manifest_at[1] :]
    for file in delta.target.side_files:
        content = (case.target / file.path).read_bytes()
        assert file.digest == blake3(content).digest()
        if file.stored:
            place = file.stored
            coded = payload[place.offset : place.offset + place.stored_bytes]
            assert read_text(coded, place.n_bytes) == content
    for weights in delta.target.weight_files:
        raw = (case.target / weights.path).read_bytes()
        n = int.from_bytes(raw[:8], "little")
        assert weights.digest == blake3(raw[8 : 8 + n]).digest()[:16]
