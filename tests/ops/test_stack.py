"""``stack``: what makes a chain, what makes siblings, and what is a conflict."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Raw, noise, of_array, small_chunks, write, write_file
from ops.maker import Maker, unknown_target

import sparsedelta
from sparsedelta import Delta
from sparsedelta.codecs.chunk import MAX_SPAN
from sparsedelta.errors import BaseNeeded, ConflictError, Corrupt


@pytest.fixture
def steps(make: Maker) -> list[Path]:
    """Four checkpoints, each with one more element changed."""
    raw = noise("BF16", 4, 4)
    tensors = [raw.changed(*range(0, 2 * n, 2)) for n in range(4)]
    return [make.checkpoint({"w": tensor}) for tensor in tensors]


def deltas_of(make: Maker, steps: list[Path]) -> list[Delta]:
    return [make.diff(a, b) for a, b in itertools.pairwise(steps)]


def test_files_are_stacked(make: Maker, steps: list[Path], tmp_path: Path) -> None:
    paths = []
    for number, delta in enumerate(deltas_of(make, steps)):
        paths.append(tmp_path / f"{number}.sd")
        delta.save(paths[-1])
    result = make.stack(*paths)
    assert result.nnz == 3
    make.check(result, steps[0], steps[-1])


def test_one_delta_stays_as_it_is(make: Maker, steps: list[Path], tmp_path: Path) -> None:
    delta = make.diff(steps[0], steps[1], base_id="org/m@1", info={"lr": 1e-3})
    delta.save(tmp_path / "a.sd")
    make.stack(delta).save(tmp_path / "b.sd")
    assert (tmp_path / "a.sd").read_bytes() == (tmp_path / "b.sd").read_bytes()


def test_info_is_the_last_and_how_many(make: Maker, steps: list[Path]) -> None:
    pairs = itertools.pairwise(steps)
    a, b, c = (make.diff(x, y, info={"step": n}) for n, (x, y) in enumerate(pairs))
    assert make.stack(make.stack(a, b), c).info == {"stacked": 3, "last": {"step": 2}}
    assert make.stack(a, make.stack(b, c)).info == {"stacked": 3, "last": {"step": 2}}


def test_the_hint_is_that_of_the_first_base(make: Maker, steps: list[Path]) -> None:
    a = make.diff(steps[0], steps[1], base_id="org/m@1")
    b = make.diff(steps[1], steps[2], base_id="org/m@2")
    assert make.stack(a, b).base.id == "org/m@1"


def test_differences_wrap_around(make: Maker) -> None:
    """Integers of one byte: 200 + 100 = 44 modulo 256, in two steps of more than half the range."""
    folders = [
        make.checkpoint({"w": of_array("U8", np.array([value], np.uint8))})
        for value in (0, 200, 44, 255, 0)
    ]
    result = make.stack(*deltas_of(make, folders[:4]))
    assert result.nnz == 1
    make.check(result, folders[0], folders[3])
    assert make.stack(*deltas_of(make, folders)).nnz == 0


def test_positions_that_return_to_the_base_vanish(make: Maker) -> None:
    raw = noise("F32", 8)
    folders = [
        make.checkpoint({"w": raw.changed(*positions)}) for positions in ([], [0, 4], [4, 8])
    ]
    a, b = deltas_of(make, folders)
    assert (a.nnz, b.nnz, make.stack(a, b).nnz) == (2, 2, 2)


def test_new_values_that_return_stay_unless_the_base_is_given(make: Maker) -> None:
    raw = noise("F32", 8)
    base, there, back = (
        make.checkpoint({"w": raw.changed(*positions)}) for positions in ([], [0, 4], [4])
    )
    a, b = make.diff(base, there, values="target"), make.diff(there, back, values="target")
    without, given = make.stack(a, b), make.stack(a, b, base=base)
    assert (without.nnz, given.nnz) == (2, 1)
    for result in (without, given):
        make.check(result, base, back)


def test_encodings_that_meet_need_the_base(make: Maker, steps: list[Path]) -> None:
    a, b = make.diff(steps[0], steps[1]), make.diff(steps[1], steps[2], values="target")
    with pytest.raises(
        BaseNeeded, match=r"'w' .* need the base; give the base \(base=, --base\)"
    ) as e:
        make.stack(a, b)
    assert e.value.tensor == "w"
    make.check(make.stack(a, b, base=steps[0]), steps[0], steps[2])


def test_new_values_over_all_differences_need_no_base(make: Maker) -> None:
    raw = noise("F32", 8)
    folders = [make.checkpoint({"w": raw.changed(*p)}) for p in ([], [0, 4], [1, 5, 8])]
    a = make.diff(folders[0], folders[1])
    b = make.diff(folders[1], folders[2], values="target")
    result = make.stack(a, b)
    assert [chunk.coding.values for row in result.tensors for chunk in row.chunks] == ["target"]
    make.check(result, folders[0], folders[2])


def no_encoding(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Return a list that would hold what is encoded while stacking."""
    made: list[object] = []
    monkeypatch.setattr(
        "sparsedelta.ops.stacking.fold.encode_chunk", lambda *a, **k: made.append(a)
    )
    return made


def test_chunks_that_only_one_changes_are_taken_over(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = np.zeros(MAX_SPAN + 10, np.uint8)
    folders = []
    for position in (0, 5, MAX_SPAN + 3):
        data[position] = 1
        folders.append(make.checkpoint({"w": of_array("U8", data)}))
    a, b = deltas_of(make, folders)
    made = no_encoding(monkeypatch)
    result = make.stack(a, b)
    assert not made
    assert result.nnz == 2
    assert result.tensors[0].chunks == a.tensors[0].chunks + b.tensors[0].chunks
    make.check(result, folders[0], folders[2])


class TestOtherBorders:
    """Deltas of one tensor whose chunks begin and end at different elements."""

    raw = noise("F32", 30)

    def diff_in(
        self, make: Maker, n_elements: int, base: Path, target: Path, **options: Any
    ) -> Delta:
        with pytest.MonkeyPatch.context() as patch:
            small_chunks(patch, n_elements, 1 << 10)
            return make.diff(base, target, **options)

    def deltas(
        self, make: Maker, spans: list[int], steps: list[list[int]], **options: Any
    ) -> tuple[list[Path], list[Delta]]:
        """Return checkpoints with more and more elements changed, and their deltas."""
        done: list[int] = []
        folders = [make.checkpoint({"w": self.raw})]
        for step in steps:
            done += [4 * n for n in step]
            folders.append(make.checkpoint({"w": self.raw.changed(*done)}))
        pairs = zip(spans, itertools.pairwise(folders), strict=True)
        return folders, [self.diff_in(make, n, *pair, **options) for n, pair in pairs]

    @pytest.mark.parametrize("values", ["ulp", "target"])
    @pytest.mark.parametrize("with_base", [False, True])
    def test_a_chain(self, make: Maker, values: str, with_base: bool) -> None:
        steps = [[0, 9, 10, 21, 29], [3, 8, 11, 12, 24], [1, 13, 28]]
        folders, deltas = self.deltas(make, [7, 10, 13], steps, values=values)
        starts = [[chunk.start for chunk in delta.tensors[0].chunks] for delta in deltas]
        assert starts == [[0, 7, 21, 28], [0, 10, 20], [0, 13, 26]]
        result = make.stack(*deltas, base=folders[0] if with_base else None)
        assert result.nnz == 13
        make.check(result, folders[0], folders[-1])

    def test_chunks_that_none_overlaps_are_taken_over(
        self, make: Maker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of 7 elements at 0 and 14, and of 10 at 20: 14 … 21 and 20 … 30 overlap."""
        folders, (a, b) = self.deltas(make, [7, 10], [[0, 15], [22]])
        result = make.stack(a, b)
        first, folded = result.tensors[0].chunks
        assert first == a.tensors[0].chunks[0]
        assert (folded.start, folded.end, folded.nnz) == (14, 30, 2)
        make.check(result, folders[0], folders[-1])
        folders, (a, b) = self.deltas(make, [7, 10], [[0, 8], [22]])
        made = no_encoding(monkeypatch)
        result = make.stack(a, b)
        assert not made
        assert result.tensors[0].chunks == a.tensors[0].chunks + b.tensors[0].chunks
        make.check(result, folders[0], folders[-1])

    def test_value_encodings_may_lie_side_by_side(self, make: Maker) -> None:
        """Differences and new values need no base where no chunk of one overlaps one of the other."""
        base, middle, target = (
            make.checkpoint({"w": self.raw.changed(*p)}) for p in ([], [0], [0, 88])
        )
        a = self.diff_in(make, 7, base, middle)
        b = self.diff_in(make, 10, middle, target, values="target")
        result = make.stack(a, b)
        assert [chunk.coding.values for chunk in result.tensors[0].chunks] == ["ulp", "target"]
        make.check(result, base, target)

    def test_new_rows_are_apart_from_those_of_the_base(self, make: Maker) -> None:
        """New values for what the base has not meet differences for what it has, in one span."""
        grown = Raw("F32", (40,), self.raw.changed(0).data + noise("F32", 10).data)
        base, middle, target = (
            make.checkpoint({"w": raw}) for raw in (self.raw, grown, grown.changed(4 * 29, 4 * 31))
        )
        a, b = self.diff_in(make, 10, base, middle), self.diff_in(make, 18, middle, target)
        assert [(c.start, c.coding.values) for c in a.tensors[0].chunks] == [
            (0, "ulp"), (30, "target"),
        ]  # fmt: skip
        assert [(c.start, c.end) for c in b.tensors[0].chunks] == [(18, 36)]
        result = make.stack(a, b)
        assert [(c.start, c.end, c.coding.values) for c in result.tensors[0].chunks] == [
            (0, 10, "ulp"), (18, 30, "ulp"), (30, 40, "target"),
        ]  # fmt: skip
        make.check(result, base, target)

    def test_what_was_coded_by_exponents_is_taken_over(self, make: Maker) -> None:
        """Chunks that only the base can decode need not be decoded where no other overlaps."""
        draw = np.random.default_rng(0)
        values = draw.standard_normal(40_000).astype(np.float32).view(np.uint32)
        small = np.flatnonzero((values[:20_000] >> 23 & 0xFF) < 124)
        stepped = values.copy()
        stepped[small] += 1
        both = stepped.copy()
        both[30_000] += 1
        folders = [make.checkpoint({"w": of_array("F32", v)}) for v in (values, stepped, both)]
        a, b = (self.diff_in(make, 20_000, *pair) for pair in itertools.pairwise(folders))
        assert a.tensors[0].chunks[0].coding.classes
        result = make.stack(a, b)
        assert result.tensors[0].chunks[0] == a.tensors[0].chunks[0]
        make.check(result, folders[0], folders[2])
        cut = make.checkpoint({"w": of_array("F32", both[:15_000])})
        with pytest.raises(BaseNeeded, match=r"'w'.*give the base \(base=, --base\)"):
            make.stack(a, make.diff(folders[1], cut))
        given = make.stack(a, make.diff(folders[1], cut), base=folders[0])
        make.check(given, folders[0], cut)

    def test_siblings_that_lie_side_by_side(self, make: Maker) -> None:
        base, one, other, both = (
            make.checkpoint({"w": self.raw.changed(*p)}) for p in ([], [0], [88], [0, 88])
        )
        a, b = self.diff_in(make, 7, base, one), self.diff_in(make, 10, base, other)
        result = make.stack(a, b)
        assert result.target_fingerprint is None
        assert result.tensors[0].chunks == a.tensors[0].chunks + b.tensors[0].chunks
        make.check(result, base, both)
        known = make.stack(a, b, base=base)
        assert known.tensors[0].target == make.diff(base, both).tensors[0].target
        make.check(known, base, both)


def test_touched_digests_of_an_added_tensor_are_known(make: Maker) -> None:
    raw = noise("F32", 8)
    folders = [
        make.checkpoint({"w": raw}),
        make.checkpoint({"w": raw, "new": noise("F32", 4)}),
        make.checkpoint({"w": raw, "new": noise("F32", 4).changed(0)}),
    ]
    result = make.stack(*deltas_of(make, folders))
    direct = make.diff(folders[0], folders[2])
    assert result.tensors == direct.tensors
    assert sparsedelta.verify(result, base=folders[0]).base_checked


class TestOrder:
    def test_a_gap_names_the_tensor(self, make: Maker, steps: list[Path]) -> None:
        a, _, c = deltas_of(make, steps)
        with pytest.raises(
            ConflictError,
            match=r"tensor 'w': delta 2 was not made from the target of delta 1, .* missing",
        ) as error:
            make.stack(a, c)
        assert error.value.tensor == "w"

    def test_a_wrong_order_is_put_right(self, make: Maker, steps: list[Path]) -> None:
        a, b, c = deltas_of(make, steps)
        with pytest.raises(ConflictError, match="a chain in the order 2, 3, 1"):
            make.stack(c, a, b)

    def test_a_cycle_in_order_is_nothing(self, make: Maker, steps: list[Path]) -> None:
        there, back = make.diff(steps[0], steps[1]), make.diff(steps[1], steps[0])
        result = make.stack(there, back)
        assert all(row.is_copied for row in result.tensors)

    def test_a_cycle_out_of_order_is_put_right(self, make: Maker, steps: list[Path]) -> None:
        a, b = make.diff(steps[0], steps[1]), make.diff(steps[1], steps[2])
        c = make.diff(steps[2], steps[0])
        with pytest.raises(ConflictError, match="a chain in the order 1, 3, 2"):
            make.stack(b, a, c)

    def test_none_at_all(self) -> None:
        with pytest.raises(ValueError, match="at least one"):
            sparsedelta.stack()

    def test_an_unknown_target_is_taken_to_be_right(self, make: Maker) -> None:
        raw = noise("F32", 8)
        base, one, both, more = (
            make.checkpoint({"w": raw.changed(*p)}) for p in ([], [0], [0, 20], [0, 20, 8])
        )
        unknown = unknown_target(make.diff(base, both))
        later = make.diff(both, more)
        result = make.stack(unknown, later)
        assert result.target_fingerprint == later.target_fingerprint
        make.check(result, base, more)
        # Of one base with what follows it, it is not the target before that.
        for beside in (make.diff(base, base), make.diff(base, make.checkpoint({"w": raw}))):
            make.check(make.stack(unknown, beside), base, both)
        with pytest.raises(ConflictError, match="touch 1 positions in common"):
            make.stack(unknown, make.diff(base, one))

    def test_what_is_dropped_may_have_been_changed(self, make: Maker) -> None:
        raw = noise("F32", 8)
        base = make.checkpoint({"v": raw, "w": raw})
        changed, dropped = (
            make.checkpoint({"v": raw, "w": raw.changed(0)}),
            make.checkpoint({"v": raw}),
        )
        result = make.stack(make.diff(base, changed), make.diff(changed, dropped))
        assert (len(result.tensors), result.base.n_unused) == (1, 1)
        make.check(result, base, dropped)

    def test_a_delta_that_is_inconsistent(self, make: Maker, steps: list[Path]) -> None:
        """Its target's digest is another: the base shows it, and so does applying the stack."""
        a, b, _ = deltas_of(make, steps)
        row = b.tensors[0]
        lie = replace(b, tensors=(replace(row, target=row.target.with_digest(bytes(16))),))
        with pytest.raises(Corrupt, match="is inconsistent"):
            make.stack(a, lie, base=steps[0])
        with pytest.raises(Corrupt, match="is inconsistent"):
            sparsedelta.apply(steps[0], make.stack(a, lie), make.path / "out")


class TestLineage:
    """What a tensor was made from, through other names, files and layouts."""

    raw, other = noise("BF16", 6, 4), noise("F32", 5)

    def folder(self, make: Maker, files: dict[str, dict[str, Raw]]) -> Path:
        make.n_made += 1
        path = make.path / f"checkpoint-{make.n_made}"
        for name, tensors in files.items():
            write_file(path / f"{name}.safetensors", tensors)
        return path

    def check(self, make: Maker, *files: dict[str, dict[str, Raw]]) -> Delta:
        """Stack the deltas from each checkpoint to the next, with and without the base."""
        folders = [self.folder(make, one) for one in files]
        for base in (None, folders[0]):
            result = make.stack(*deltas_of(make, folders), base=base)
            make.check(result, folders[0], folders[-1])
        return result

    def test_renames(self, make: Maker) -> None:
        """The middle has a prefix, the end has not; the second step changes what was renamed."""
        before = {"w": self.raw, "v": self.other}
        prefixed = {f"model.{name}": raw for name, raw in before.items()}
        changed = prefixed | {"model.w": self.raw.changed(0, 8)}
        after = {"w": self.raw.changed(0, 8), "v": self.other}
        result = self.check(make, {"m": before}, {"m": prefixed}, {"m": changed}, {"m": after})
        assert result.nnz == 2
        assert result.tensors[1].is_copied
        result = self.check(make, {"m": before}, {"m": prefixed}, {"m": changed})
        assert base_keys(result)["m.safetensors", "model.w"] == ("m.safetensors", "w")

    def test_a_rename_by_content(self, make: Maker) -> None:
        result = self.check(
            make,
            {"m": {"w": self.raw}},
            {"m": {"head": self.raw, "w": self.raw}},
            {"m": {"head": self.raw.changed(4), "w": self.raw.changed(8)}},
        )
        assert set(base_keys(result).values()) == {("m.safetensors", "w")}

    def test_moved_files(self, make: Maker) -> None:
        a, b = {"v": self.other}, {"w": self.raw}
        one = {"model": a | b}
        shards = {"model-00001-of-00002": a, "model-00002-of-00002": {"w": self.raw.changed(0)}}
        turned = {"model-00001-of-00002": {"w": self.raw.changed(0, 4)}, "model-00002-of-00002": a}
        result = self.check(make, one, shards, turned)
        assert base_keys(result) == {
            ("model-00001-of-00002.safetensors", "w"): ("model.safetensors", "w"),
            ("model-00002-of-00002.safetensors", "v"): ("model.safetensors", "v"),
        }
        assert result.nnz == 2

    def test_dropped_and_added_again(self, make: Maker) -> None:
        """What comes back has no lineage: only the base tells that it was there before."""
        folders = [
            self.folder(make, {"m": tensors})
            for tensors in (
                {"v": self.other, "w": self.raw},
                {"v": self.other},
                {"v": self.other, "w": self.raw.changed(0)},
            )
        ]
        result = make.stack(*deltas_of(make, folders))
        assert base_keys(result) == {("m.safetensors", "v"): ("m.safetensors", "v")}
        assert (result.base.n_unused, result.nnz) == (1, 24)
        make.check(result, folders[0], folders[-1])
        found = make.stack(*deltas_of(make, folders), base=folders[0])
        assert (found.base.n_unused, found.nnz) == (0, 1)
        assert base_keys(found) == base_keys(make.diff(folders[0], folders[-1]))
        make.check(found, folders[0], folders[-1])

    def test_retyped_and_resized(self, make: Maker) -> None:
        grown = Raw("BF16", (8, 4), self.raw.changed(0).data + noise("BF16", 2, 4).data)
        cut = Raw("BF16", (3, 4), grown.data[:24])
        result = self.check(make, *({"m": {"w": raw}} for raw in (self.raw, grown, cut)))
        assert (result.tensors[0].keep, result.nnz) == (12, 1)
        retyped = noise("F16", 6, 4)
        files = [{"m": {"w": raw}} for raw in (self.raw, retyped, retyped.changed(0))]
        result = self.check(make, *files)
        assert result.tensors[0].base is None


def base_keys(delta: Delta) -> dict[tuple[str, str], tuple[str, str]]:
    """Return what each tensor that has a base tensor is made from."""
    return {row.key: row.base.key for row in delta.tensors if row.base}


class TestFiles:
    def test_a_file_carried_before_is_carried(self, make: Maker) -> None:
        raw = noise("F32", 8)
        base = make.checkpoint({"w": raw}, {"config.json": "1", "t.json": "t"})
        middle = make.checkpoint({"w": raw.changed(0)}, {"config.json": "2", "t.json": "t"})
        target = make.checkpoint(
            {"w": raw.changed(0, 4)}, {"config.json": "2", "t.json": "t", "new": "n"}
        )
        result = make.stack(make.diff(base, middle), make.diff(middle, target))
        carried = {file.path: file.stored is not None for file in result.target.side_files}
        assert carried == {"config.json": True, "t.json": False, "new": True}
        make.check(result, base, target)

    def test_a_file_the_chain_does_not_make(self, make: Maker) -> None:
        raw = noise("F32", 8)
        base = make.checkpoint({"w": raw})
        middle = make.checkpoint({"w": raw.changed(0)})
        first = make.diff(base, middle)
        write(middle / "README.md", "put there later")
        target = make.checkpoint({"w": raw.changed(4)}, {"README.md": "put there later"})
        with pytest.raises(
            ConflictError,
            match=r"delta 2 takes file 'README.md' .* is missing from the target of delta 1",
        ):
            make.stack(first, make.diff(middle, target))

    def test_without_changed_tensors_the_files_tell_a_chain(self, make: Maker) -> None:
        raw = noise("F32", 8)
        base, one, two = (make.checkpoint({"w": raw}, {"c": text}) for text in ("0", "1", "2"))
        other = make.checkpoint({"w": raw}, {"c": "0", "d": "d"})
        make.check(make.stack(make.diff(base, one), make.diff(one, two)), base, two)
        result = make.stack(make.diff(base, one), make.diff(base, other))
        both = make.checkpoint({"w": raw}, {"c": "1", "d": "d"})
        make.check(result, base, both)


def test_the_payload_is_let_go_on_failure(
    make: Maker, steps: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[Callable[..., object]] = []
    monkeypatch.setattr(
        "sparsedelta.format.spool.SpoolPayload.close",
        lambda self: closed.append(self._file.close()),
    )
    a, b = make.diff(steps[0], steps[1]), make.diff(steps[1], steps[2], values="target")
    with pytest.raises(BaseNeeded):
        sparsedelta.stack(a, b)
    assert len(closed) == 1


def test_what_is_cut_stays_cut(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk that one delta alone touches, cut by the next and grown again by the last with zeros."""
    assert sparsedelta.stack is not sparsedelta.diff  # its modules are imported now
    small_chunks(monkeypatch, 8, 16)
    raw = noise("U8", 8)
    folders = [
        make.checkpoint({"w": Raw("U8", (len(data),), data)})
        for data in (
            raw.data,
            raw.changed(1, 6).data,
            raw.changed(1).data[:5],
            raw.changed(1).data[:5] + bytes(3),
        )
    ]
    result = make.stack(*deltas_of(make, folders))
    assert result.nnz == 1
    make.check(result, folders[0], folders[-1])
