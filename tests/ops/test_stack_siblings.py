"""``stack`` of deltas of one base, and when they are not taken for a chain."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import Raw, noise, write_file, write_sharded
from ops.maker import Files, Maker, unknown_target

import sparsedelta
from sparsedelta import Delta
from sparsedelta.errors import BaseMismatch, BaseNeeded, ConflictError
from sparsedelta.ops.stack import stack_chain


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
        assert "such as 'w'" in str(e.value)
        assert "sparsedelta merge" in str(e.value)

    def test_a_tensor_that_both_change_needs_the_base(self, make: Maker) -> None:
        base, deltas = self.variants(make, [0, 2], [4], [6])
        with pytest.raises(
            BaseNeeded, match=r"several deltas change tensor 'w'.*\(base=, --base\)"
        ) as error:
            make.stack(*deltas)
        assert error.value.tensor == "w"
        result = make.stack(*deltas, base=base)
        changed = self.raw.changed(0, 2, 4, 6)
        both = make.checkpoint({"v": self.raw, "w": changed, "x": changed})
        assert result.target_fingerprint == make.diff(base, both).target_fingerprint
        make.check(result, base, both)

    def test_tensors_that_one_alone_changes_need_no_base(self, make: Maker) -> None:
        base = make.checkpoint({"v": self.raw, "w": self.raw})
        one = make.checkpoint({"v": self.raw.changed(0), "w": self.raw})
        other = make.checkpoint({"v": self.raw, "w": self.raw.changed(4)})
        both = make.checkpoint({"v": self.raw.changed(0), "w": self.raw.changed(4)})
        a, b = make.diff(base, one), make.diff(base, other)
        result = make.stack(a, b)
        assert result.tensors == make.diff(base, both).tensors
        assert result.tensors == (a.tensors[0], b.tensors[1])
        make.check(result, base, both)

    def test_single_files_of_any_name(self, make: Maker, tmp_path: Path) -> None:
        paths = {
            name: write_file(tmp_path / f"{name}.safetensors", {"v": self.raw.changed(*v), "w": w})
            for name, v, w in (
                ("base", [], self.raw),
                ("one", [0], self.raw),
                ("other", [4], self.raw.changed(6)),
                ("both", [0, 4], self.raw.changed(6)),
            )
        }
        deltas = [make.diff(paths["base"], paths[name]) for name in ("one", "other")]
        result = make.stack(*deltas, base=paths["base"])
        assert {row.file for row in result.tensors} == {"one.safetensors"}
        result.save(tmp_path / "both.sd")
        sparsedelta.apply(paths["base"], tmp_path / "both.sd", tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == paths["both"].read_bytes()

    def test_the_base_makes_a_target_known_later(self, make: Maker) -> None:
        base, deltas = self.variants(make, [0, 2], [4])
        known = make.stack(*deltas, base=base)
        unknown = unknown_target(known)
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
        one, other = (
            make.checkpoint({"v": raw}),
            make.checkpoint({"v": raw, "w": raw, "n": raw}),
        )  # a copy
        with pytest.raises(ConflictError, match="deltas 1 and 2 both add"):
            make.stack(make.diff(base, one), make.diff(base, other))

    def test_a_removed_tensor_cannot_be_changed(self, make: Maker) -> None:
        raw = self.raw
        base = make.checkpoint({"v": raw, "w": raw})
        one, other = make.checkpoint({"v": raw}), make.checkpoint({"v": raw, "w": raw.changed(0)})
        with pytest.raises(
            ConflictError, match=r"delta 2 changes tensor 'w', which another .* removes"
        ):
            make.stack(make.diff(base, one), make.diff(base, other))

    def test_a_renamed_tensor_cannot_be_changed(self, make: Maker) -> None:
        raw = self.raw
        base = make.checkpoint({"v": raw, "w": noise("F32", 7)})
        one = make.checkpoint({"v": raw, "x": noise("F32", 7), "y": raw})
        other = make.checkpoint({"v": raw, "w": noise("F32", 7).changed(0)})
        with pytest.raises(ConflictError, match=r"'w', which another .* renames"):
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
            both = make.checkpoint({"w": raw.changed(0, 2)}, found)
            make.check(make.stack(*deltas, base=base), base, both)

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
        with pytest.raises(ConflictError, match="have other headers in their files"):
            make.stack(make.diff(base, one), make.diff(base, other))


def test_deltas_that_are_known_to_be_a_chain_are_not_taken_for_siblings(make: Maker) -> None:
    """The second one takes a file from its base that is another one in the target of the first."""
    raw = noise("BF16", 10, 4)
    base = make.checkpoint({"w": raw}, {"t": "one"})
    first = make.diff(base, make.checkpoint({"w": raw}, {"t": "two"}))
    second = make.diff(base, make.checkpoint({"w": raw.changed(3)}, {"t": "one"}))
    make.stack(first, second)
    with pytest.raises(ConflictError, match="takes file 't' from its base, but this file differs"):
        stack_chain([first, second], base)


def test_siblings_in_other_shards_of_which_one_adds_a_tensor(make: Maker, tmp_path: Path) -> None:
    """No tensor is removed or renamed, as the shards alone would suggest."""
    raw = noise("BF16", 10, 4)
    one = make.checkpoint({"v": raw, "w": raw})
    grown = make.checkpoint({"v": raw, "w": raw, "x": raw})
    write_sharded(tmp_path / "two", [{"v": raw}, {"w": raw}])
    write_sharded(tmp_path / "tuned", [{"v": raw.changed(2)}, {"w": raw}])
    deltas = make.diff(tmp_path / "two", tmp_path / "tuned"), make.diff(one, grown)
    for order in (deltas, deltas[::-1]):
        with pytest.raises(ConflictError, match="have their tensors in other files, so they have"):
            make.stack(*order)


def test_siblings_of_which_one_renames_all_tensors_and_the_other_changes_a_file(
    make: Maker,
) -> None:
    raw = noise("BF16", 10, 4)
    base = make.checkpoint({"v": raw, "w": raw.changed(1)}, {"c": "1"})
    renamed = {"model.v": raw, "model.w": raw.changed(1)}
    one = make.diff(base, make.checkpoint(renamed, {"c": "1"}))
    other = make.diff(base, make.checkpoint({"v": raw, "w": raw.changed(1)}, {"c": "2"}))
    for deltas in ((one, other), (other, one)):
        make.check(make.stack(*deltas), base, make.checkpoint(renamed, {"c": "2"}))
