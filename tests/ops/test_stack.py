"""``stack``: what makes a chain, what makes siblings, and what is a conflict."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Raw, assert_same_files, noise, of_array, small_chunks, write, write_file

import sparsedelta
from sparsedelta import Delta
from sparsedelta.codecs.chunk import CHUNK_ELEMENTS
from sparsedelta.errors import BaseMismatch, ConflictError, Corrupt

Files = dict[str, str]


class Maker:
    """Writes checkpoints and makes deltas of them, closed at the end."""

    def __init__(self, path: Path, context: ExitStack) -> None:
        self.path = path
        self.context = context
        self.n_made = 0

    def checkpoint(self, tensors: dict[str, Raw], files: Files | None = None) -> Path:
        self.n_made += 1
        folder = self.path / f"checkpoint-{self.n_made}"
        write_file(folder / "model.safetensors", tensors, {"format": "pt"})
        for name, text in (files or {}).items():
            write(folder / name, text)
        return folder

    def diff(self, base: Path, target: Path, **options: Any) -> Delta:
        return self.context.enter_context(sparsedelta.diff(base, target, **options))

    def stack(self, *deltas: Delta | Path, **options: Any) -> Delta:
        return self.context.enter_context(sparsedelta.stack(*deltas, **options))

    def check(self, delta: Delta, base: Path, target: Path) -> None:
        path, out = self.path / "made.sd", self.path / "out"
        delta.save(path, overwrite=True)
        sparsedelta.apply(base, path, out, overwrite=True)
        assert_same_files(target, out)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Maker]:
    with ExitStack() as context:
        yield Maker(tmp_path, context)


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
    with pytest.raises(ConflictError, match=r"'w' .* only the base tells: give it \(--base\)") as e:
        make.stack(a, b)
    assert e.value.tensor == "w"
    make.check(make.stack(a, b, base=steps[0]), steps[0], steps[2])


def test_new_values_over_all_differences_need_no_base(make: Maker) -> None:
    raw = noise("F32", 8)
    folders = [make.checkpoint({"w": raw.changed(*p)}) for p in ([], [0, 4], [1, 5, 8])]
    a = make.diff(folders[0], folders[1])
    b = make.diff(folders[1], folders[2], values="target")
    result = make.stack(a, b)
    assert [row.change and row.change.values for row in result.tensors] == ["target"]
    make.check(result, folders[0], folders[2])


def test_chunks_that_only_one_changes_are_taken_over(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = np.zeros(CHUNK_ELEMENTS + 10, np.uint8)
    folders = []
    for position in (0, 5, CHUNK_ELEMENTS + 3):
        data[position] = 1
        folders.append(make.checkpoint({"w": of_array("U8", data)}))
    a, b = deltas_of(make, folders)
    made: list[object] = []
    monkeypatch.setattr("sparsedelta.ops.stacking.compose.encode_chunk", lambda *a: made.append(a))
    result = make.stack(a, b)
    assert not made
    assert result.nnz == 2
    make.check(result, folders[0], folders[2])


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
    def test_a_gap_names_both_fingerprints(self, make: Maker, steps: list[Path]) -> None:
        a, _, c = deltas_of(make, steps)
        with pytest.raises(ConflictError, match="missing") as error:
            make.stack(a, c)
        assert a.target.fingerprint is not None
        assert a.target.fingerprint.hex()[:12] in str(error.value)
        assert c.base.fingerprint.hex()[:12] in str(error.value)
        assert error.value.found == a.target.fingerprint.hex()
        assert error.value.expected == c.base.fingerprint.hex()

    def test_a_wrong_order_is_put_right(self, make: Maker, steps: list[Path]) -> None:
        a, b, c = deltas_of(make, steps)
        with pytest.raises(ConflictError, match="a chain in the order 2, 3, 1"):
            make.stack(c, a, b)

    def test_a_cycle_in_order_is_nothing(self, make: Maker, steps: list[Path]) -> None:
        there, back = make.diff(steps[0], steps[1]), make.diff(steps[1], steps[0])
        result = make.stack(there, back)
        assert all(row.change is None for row in result.tensors)

    def test_a_cycle_out_of_order_has_no_beginning(self, make: Maker, steps: list[Path]) -> None:
        a, b = make.diff(steps[0], steps[1]), make.diff(steps[1], steps[2])
        c = make.diff(steps[2], steps[0])
        with pytest.raises(ConflictError, match="a cycle, 1, 3, 2 and so on"):
            make.stack(b, a, c)

    def test_none_at_all(self) -> None:
        with pytest.raises(ValueError, match="at least one"):
            sparsedelta.stack()

    def test_an_unknown_target_ends_a_chain(self, make: Maker) -> None:
        raw = noise("F32", 8)
        base, one, other, both, more = (
            make.checkpoint({"w": raw.changed(*p)}) for p in ([], [0], [4], [0, 4], [0, 4, 8])
        )
        one_delta, other_delta = make.diff(base, one), make.diff(base, other)
        unknown = make.stack(one_delta, other_delta)
        with pytest.raises(ConflictError, match=r"not known.*make delta 1 again with its base"):
            make.stack(unknown, make.diff(both, more))
        known = make.stack(one_delta, other_delta, base=base)
        make.check(make.stack(known, make.diff(both, more)), base, more)

    def test_neighbours_that_contradict_each_other(self, make: Maker, steps: list[Path]) -> None:
        import dataclasses

        a, b, _ = deltas_of(make, steps)
        row = b.tensors[0]
        assert row.base
        lie = dataclasses.replace(row, base=dataclasses.replace(row.base, digest=bytes(16)))
        with pytest.raises(Corrupt, match="is inconsistent"):
            make.stack(a, dataclasses.replace(b, tensors=(lie,)))


class TestFiles:
    def test_a_file_carried_before_is_carried(self, make: Maker) -> None:
        raw = noise("F32", 8)
        base = make.checkpoint({"w": raw}, {"config.json": "1", "t.json": "t"})
        middle = make.checkpoint({"w": raw.changed(0)}, {"config.json": "2", "t.json": "t"})
        target = make.checkpoint(
            {"w": raw.changed(0, 4)}, {"config.json": "2", "t.json": "t", "new": "n"}
        )
        result = make.stack(make.diff(base, middle), make.diff(middle, target))
        carried = {file.path: file.carried for file in result.target.side_files}
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
            ConflictError, match=r"delta 2 takes file 'README.md' .* delta 1 has none"
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


class TestSiblings:
    raw = noise("BF16", 10, 4)

    def variants(self, make: Maker, *positions: list[int]) -> tuple[Path, list[Delta]]:
        base = make.checkpoint({"v": self.raw, "w": self.raw, "x": self.raw})
        targets = [
            make.checkpoint({"v": self.raw, "w": self.raw.changed(*p), "x": self.raw.changed(*p)})
            for p in positions
        ]
        return base, [make.diff(base, target) for target in targets]

    def test_overlap_is_counted(self, make: Maker) -> None:
        _, deltas = self.variants(make, [0, 2, 4], [2, 4, 6], [4, 8])
        with pytest.raises(
            ConflictError, match="touch 4 positions in common, in 2 of 3 tensors"
        ) as e:
            make.stack(*deltas)
        assert "'w' among them" in str(e.value)
        assert "sparsedelta merge" in str(e.value)

    def test_without_the_base_the_target_is_unknown(self, make: Maker) -> None:
        base, deltas = self.variants(make, [0, 2], [4], [6])
        result = make.stack(*deltas)
        assert result.target.fingerprint is None
        assert [row.target and row.target.digest is None for row in result.tensors] == [
            False, True, True,
        ]  # fmt: skip
        changed = self.raw.changed(0, 2, 4, 6)
        make.check(result, base, make.checkpoint({"v": self.raw, "w": changed, "x": changed}))

    def test_the_base_makes_a_target_known_later(self, make: Maker) -> None:
        base, deltas = self.variants(make, [0, 2], [4])
        unknown = make.stack(*deltas)
        known = make.stack(*deltas, base=base)
        for later in (
            make.stack(unknown, base=base),
            make.stack(unknown, make.diff(base, base), base=base),
        ):
            assert later.target == known.target
            assert later.tensors == known.tensors

    def test_the_wrong_base(self, make: Maker) -> None:
        _, deltas = self.variants(make, [0, 2], [4])
        other = make.checkpoint({"v": self.raw, "w": self.raw, "x": self.raw.changed(20)})
        with pytest.raises(BaseMismatch, match="'x'"):
            make.stack(*deltas, base=other)

    def test_one_may_change_the_structure(self, make: Maker) -> None:
        raw = self.raw
        base = make.checkpoint({"v": raw, "w": raw})
        grown = make.checkpoint(
            {"v": raw, "w": Raw("BF16", (11, 4), raw.data + raw.data[:8]), "n": raw}
        )
        tuned = make.checkpoint({"v": raw.changed(0), "w": raw})
        both = make.checkpoint(
            {"v": raw.changed(0), "w": Raw("BF16", (11, 4), raw.data + raw.data[:8]), "n": raw}
        )
        deltas = [make.diff(base, tuned), make.diff(base, grown)]
        for order in (deltas, deltas[::-1]):
            make.check(make.stack(*order), base, both)
            assert make.stack(*order, base=base).tensors == make.diff(base, both).tensors

    def test_not_both(self, make: Maker) -> None:
        raw = self.raw
        base = make.checkpoint({"v": raw, "w": raw})
        one, other = make.checkpoint({"v": raw}), make.checkpoint({"v": raw, "w": raw, "n": raw})
        with pytest.raises(ConflictError, match="deltas 1 and 2 both add"):
            make.stack(make.diff(base, one), make.diff(base, other))

    def test_a_removed_tensor_cannot_be_changed(self, make: Maker) -> None:
        raw = self.raw
        base = make.checkpoint({"v": raw, "w": raw})
        one, other = make.checkpoint({"v": raw}), make.checkpoint({"v": raw, "w": raw.changed(0)})
        with pytest.raises(ConflictError, match=r"delta 1 removes.*'w', delta 2 changes"):
            make.stack(make.diff(base, one), make.diff(base, other))

    def test_other_orders_of_tensors(self, make: Maker) -> None:
        raw = self.raw
        base = make.checkpoint({"v": raw, "w": raw})
        one = make.checkpoint({"w": raw, "v": raw.changed(0)})
        other = make.checkpoint({"v": raw, "w": raw.changed(0)})
        with pytest.raises(ConflictError, match="delta 2 lays the tensors out"):
            make.stack(make.diff(base, one), make.diff(base, other))

    @pytest.mark.parametrize(
        ("files", "found"),
        [
            (({"c": "1"}, {"c": "0"}), {"c": "1"}),
            (({"c": "0", "d": "d"}, {"c": "1"}), {"c": "1", "d": "d"}),
            (({}, {"c": "0"}), {}),
            (({"c": "1"}, {"c": "1"}), {"c": "1"}),
            (({"c": "1"}, {"c": "2"}), None),
        ],
    )
    def test_files(self, make: Maker, files: tuple[Files, Files], found: Files | None) -> None:
        raw = self.raw
        base = make.checkpoint({"w": raw}, {"c": "0"})
        deltas = [
            make.diff(base, make.checkpoint({"w": raw.changed(2 * n)}, there))
            for n, there in enumerate(files)
        ]
        if found is None:
            with pytest.raises(ConflictError, match="different files 'c'"):
                make.stack(*deltas)
        else:
            make.check(make.stack(*deltas), base, make.checkpoint({"w": raw.changed(0, 2)}, found))

    def test_headers_are_compared(self, make: Maker) -> None:
        raw = self.raw
        base = make.checkpoint({"w": raw})
        one = make.checkpoint({"w": raw.changed(0)})
        other = make.path / "spaced"
        write_file(
            other / "model.safetensors",
            {"w": raw.changed(4)},
            {"format": "pt"},
            spell=lambda fields: json.dumps(fields).encode(),
        )
        with pytest.raises(ConflictError, match="delta 2 lays"):
            make.stack(make.diff(base, one), make.diff(base, other))


def test_the_payload_is_let_go_on_failure(
    make: Maker, steps: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[Callable[..., object]] = []
    monkeypatch.setattr(
        "sparsedelta.format.spool.SpoolPayload.close",
        lambda self: closed.append(self._file.close()),
    )
    a, b = make.diff(steps[0], steps[1]), make.diff(steps[1], steps[2], values="target")
    with pytest.raises(ConflictError):
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
