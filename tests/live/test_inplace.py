"""Deltas on a model in memory: exact results, checks before the first write, and undoing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import small_chunks
from live.live_helpers import Disk, Net, State, copied, disk, same, tuned
from torch import nn

import sparsedelta
from sparsedelta import Delta
from sparsedelta.errors import (
    AlreadyApplied,
    BaseMismatch,
    ConflictError,
    Corrupt,
    PartlyApplied,
    StructureMismatch,
)


@pytest.fixture(name="disk")
def _disk(tmp_path: Path) -> Iterator[Disk]:
    yield from disk(tmp_path)


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def target(net: Net) -> State:
    return tuned(net.state_dict())


@pytest.fixture
def delta(disk: Disk, net: Net, target: State) -> Delta:
    return disk.diff(net.state_dict(), target)


class TestRightModel:
    @pytest.mark.parametrize("verify", ["touched", "full", "none"])
    def test_apply_and_revert(self, net: Net, target: State, delta: Delta, verify: Any) -> None:
        before = copied(net.state_dict())
        delta.apply_(net, verify=verify)
        assert same(net.state_dict(), target)
        delta.revert_(net, verify=verify)
        assert same(net.state_dict(), before)

    def test_applied(self, net: Net, target: State, delta: Delta) -> None:
        before = copied(net.state_dict())

        def fail() -> None:
            with delta.applied(net):
                assert same(net.state_dict(), target)
                raise KeyError

        with pytest.raises(KeyError):
            fail()
        assert same(net.state_dict(), before)

    def test_new_values(self, disk: Disk, net: Net, target: State) -> None:
        before = copied(net.state_dict())
        delta = disk.diff(before, target, values="target")
        with delta.applied(net):
            assert same(net.state_dict(), target)
        assert same(net.state_dict(), before)
        delta.apply_(net)
        with pytest.raises(ConflictError, match="new values of tensor"):
            delta.revert_(net)
        assert same(net.state_dict(), target)

    def test_state_dict(self, net: Net, target: State, delta: Delta) -> None:
        state = copied(net.state_dict())
        delta.apply_(state)
        assert same(state, target)

    def test_parameters_stay_the_same_objects(self, net: Net, delta: Delta) -> None:
        before = {
            name: (id(p), p.data_ptr(), p.requires_grad) for name, p in net.named_parameters()
        }
        delta.apply_(net)
        assert before == {
            name: (id(p), p.data_ptr(), p.requires_grad) for name, p in net.named_parameters()
        }

    def test_a_delta_that_was_not_saved(self, disk: Disk, net: Net, target: State) -> None:
        with sparsedelta.diff(disk.save(net.state_dict()), disk.save(target)) as delta:
            delta.apply_(net)
        assert same(net.state_dict(), target)

    @pytest.mark.parametrize("values", ["ulp", "target"])
    def test_every_dtype(self, disk: Disk, values: str, monkeypatch: pytest.MonkeyPatch) -> None:
        small_chunks(monkeypatch, 8, 16)
        dtypes = [
            torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
            torch.uint16, torch.uint32, torch.uint64, torch.float16, torch.bfloat16, torch.float32,
            torch.float64, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2,
            torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
        ]  # fmt: skip
        try:
            torch.zeros(1, dtype=torch.uint8).view(torch.float4_e2m1fn_x2).clone()
            dtypes.append(torch.float4_e2m1fn_x2)
        except NotImplementedError:
            pass  # torch 2.8 does not copy these
        generator = torch.Generator().manual_seed(0)
        base, target = {}, {}
        for dtype in dtypes:
            width = torch.empty(0, dtype=dtype).element_size()
            sides = torch.randint(0, 256, (2, 21 * width), generator=generator, dtype=torch.uint8)
            if dtype == torch.bool:
                sides &= 1
            sides[1, : 9 * width] = sides[0, : 9 * width]
            base[str(dtype)], target[str(dtype)] = (s.clone().view(dtype).view(3, 7) for s in sides)
        delta = disk.diff(base, target, values=values)
        state = copied(base)
        with delta.applied(state, verify="full"):
            assert same(state, target)
        assert same(state, base)

    @pytest.mark.parametrize("stride", [(1, 8), (20, 2)])
    def test_tensors_that_are_not_contiguous(self, disk: Disk, stride: tuple[int, int]) -> None:
        base = {"w": torch.randn(8, 6)}
        target = tuned(base)
        memory = torch.zeros(200)
        strided = torch.as_strided(memory, (8, 6), stride)
        strided.copy_(base["w"])
        outside = int(memory.count_nonzero())
        delta = disk.diff(base, target)
        state = {"w": strided}
        delta.apply_(state, verify="full")
        assert same(state, target)
        assert int(memory.count_nonzero()) == outside
        delta.revert_(state)
        assert same(state, base)

    @pytest.mark.gpu
    def test_on_cuda(self, net: Net, target: State, delta: Delta) -> None:
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        net.cuda()
        delta.apply_(net, verify="full")
        assert same(net.state_dict(), {name: t.cuda() for name, t in target.items()})


class TestWrongModel:
    def check_untouched(
        self, state: State, delta: Delta, error: type[Exception], match: str, **options: Any
    ) -> Any:
        before = copied(state)
        with pytest.raises(error, match=match) as caught:
            delta.apply_(state, **options)
        assert same(state, before)
        return caught.value

    @pytest.mark.parametrize("verify", ["touched", "full"])
    def test_another_base(self, net: Net, target: State, delta: Delta, verify: str) -> None:
        state = copied(net.state_dict())
        changed = (state["last.weight"] != target["last.weight"]).nonzero()[0]
        state["last.weight"][tuple(changed)] = 7
        error = self.check_untouched(state, delta, BaseMismatch, "1 of 5 changed", verify=verify)
        assert error.tensor == "last.weight"

    def test_another_base_elsewhere_is_seen_in_full_only(
        self, net: Net, target: State, delta: Delta
    ) -> None:
        state = copied(net.state_dict())
        same_place = (state["last.weight"] == target["last.weight"]).nonzero()[0]
        state["last.weight"][tuple(same_place)] = 7
        self.check_untouched(state, delta, BaseMismatch, "'last.weight'", verify="full")
        delta.apply_(state)

    def test_an_unchanged_tensor_is_seen_in_full(self, disk: Disk, net: Net) -> None:
        target = tuned(net.state_dict(), "last.weight")
        delta = disk.diff(net.state_dict(), target)
        state = copied(net.state_dict())
        state["scale"][0] = 7
        self.check_untouched(state, delta, BaseMismatch, "'scale'.*leaves as it is", verify="full")

    @pytest.mark.parametrize("verify", ["touched", "full"])
    def test_already_applied(self, target: State, delta: Delta, verify: str) -> None:
        self.check_untouched(target, delta, AlreadyApplied, "already is.* target", verify=verify)

    @pytest.mark.parametrize("verify", ["touched", "full"])
    def test_partly_applied(self, net: Net, target: State, delta: Delta, verify: str) -> None:
        state = {**copied(net.state_dict()), "first.bias": target["first.bias"].clone()}
        error = self.check_untouched(
            state,
            delta,
            PartlyApplied,
            "1 of 5 changed tensors as in this delta's target",
            verify=verify,
        )
        assert error.tensor == "first.bias"

    def test_reverting_what_is_not_applied(self, net: Net, delta: Delta) -> None:
        before = copied(net.state_dict())
        with pytest.raises(AlreadyApplied, match="already is this delta's base"):
            delta.revert_(net)
        assert same(net.state_dict(), before)

    def test_one_element_too_few(self, net: Net, target: State, delta: Delta) -> None:
        """A tensor that is partly that of the target is neither base nor target."""
        state = copied(target)
        changed = (state["last.weight"] != net.state_dict()["last.weight"]).nonzero()[0]
        state["last.weight"][tuple(changed)] = net.state_dict()["last.weight"][tuple(changed)]
        self.check_untouched(state, delta, BaseMismatch, "neither")

    def test_an_inconsistent_delta(self, net: Net, delta: Delta) -> None:
        row = next(row for row in delta.tensors if row.name == "last.weight")
        (chunk,) = row.chunks
        assert chunk.touched
        wrong = dataclasses.replace(chunk, touched=(chunk.touched[0], bytes(8)))
        lie = dataclasses.replace(row, chunks=(wrong,))
        rows = tuple(lie if r is row else r for r in delta.tensors)
        state = copied(net.state_dict())
        self.check_untouched(
            state, dataclasses.replace(delta, tensors=rows), Corrupt, "last.weight"
        )

    def test_a_damaged_chunk(self, disk: Disk, net: Net, target: State) -> None:
        """All chunks are read and checked before anything is written."""
        path = disk.path / "damaged.sd"
        disk.diff(net.state_dict(), target).save(path)
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)
        with sparsedelta.load(path) as delta:
            state = copied(net.state_dict())
            self.check_untouched(state, delta, Corrupt, "damaged", verify="none")

    @pytest.mark.parametrize("undo", [False, True])
    def test_chunks_of_base_and_target(
        self, disk: Disk, monkeypatch: pytest.MonkeyPatch, undo: bool
    ) -> None:
        """A tensor with chunks of the base and chunks of the target is neither."""
        small_chunks(monkeypatch, 8, 16)
        base = {"w": torch.randn(4, 8)}
        target = tuned(base)
        delta = disk.diff(base, target)
        assert len(delta.tensors[0].chunks) > 1
        first = delta.tensors[0].chunks[0].end
        state = copied(base)
        state["w"].view(-1)[:first] = target["w"].view(-1)[:first]
        before = copied(state)
        for verify in ("touched", "full"):
            with pytest.raises(BaseMismatch, match="neither"):
                (delta.revert_ if undo else delta.apply_)(state, verify=verify)
        assert same(state, before)

    def test_unknown_check(self, net: Net, delta: Delta) -> None:
        with pytest.raises(ValueError, match="verify is 'some'"):
            delta.apply_(net, verify="some")  # type: ignore[arg-type]

    def test_not_a_model(self, delta: Delta) -> None:
        with pytest.raises(TypeError, match="model is of type list"):
            delta.apply_([])  # type: ignore[arg-type]


class TestStacked:
    """A stack made without its base lacks digests of touched values, and in some cases of tensors."""

    @pytest.fixture
    def steps(self, disk: Disk, net: Net) -> list[State]:
        first = copied(net.state_dict())
        return [first, tuned(first, seed=1), tuned(tuned(first, seed=1), seed=2)]

    def test_digests_of_touched_values_are_missing(
        self, disk: Disk, net: Net, steps: list[State]
    ) -> None:
        a, b = disk.diff(steps[0], steps[1]), disk.diff(steps[1], steps[2])
        with sparsedelta.stack(a, b) as stacked:
            with pytest.raises(ValueError, match="verify='full' or 'none'"):
                stacked.apply_(net)
            assert same(net.state_dict(), steps[0])
            stacked.apply_(net, verify="full")
        assert same(net.state_dict(), steps[2])

    @pytest.fixture
    def halves(self, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> tuple[State, State, Delta]:
        """Return a base, a target, and a stack of two deltas of its halves that have different chunks."""
        base = {"w": torch.randn(6, 10)}
        target = tuned(base)
        deltas = []
        for first, n_elements, values in ((0, 7, "ulp"), (33, 11, "target")):
            small_chunks(monkeypatch, n_elements, 16)
            half = copied(base)
            end = first + 27
            half["w"].view(-1)[first:end] = target["w"].view(-1)[first:end]
            deltas.append(disk.diff(base, half, values=values))
        target["w"].view(-1)[27:33] = base["w"].view(-1)[27:33]
        stacked = disk.context.enter_context(sparsedelta.stack(*deltas))
        return base, target, stacked

    def test_digests_of_tensors_are_missing(self, halves: tuple[State, State, Delta]) -> None:
        base, target, stacked = halves
        (row,) = stacked.tensors
        assert {chunk.start % 7 and chunk.start % 11 for chunk in row.chunks} == {0}
        state = copied(base)
        stacked.apply_(state, verify="full")
        assert same(state, target)
        with pytest.raises(AlreadyApplied):
            stacked.apply_(state)

    def test_encodings_by_chunk(self, halves: tuple[State, State, Delta]) -> None:
        base, target, stacked = halves
        assert {chunk.coding.values for chunk in stacked.tensors[0].chunks} == {"ulp", "target"}
        state = copied(base)
        with stacked.applied(state):
            assert same(state, target)
        assert same(state, base)
        stacked.apply_(state)
        with pytest.raises(ConflictError, match="new values of tensor 'w'"):
            stacked.revert_(state)
        assert same(state, target)

    def test_reverting_in_full(self, disk: Disk, steps: list[State]) -> None:
        """If the digest of a target tensor is not known, only its touched values are compared."""
        delta = disk.diff(steps[0], steps[1])
        rows = (dataclasses.replace(r, target=r.target.with_digest(None)) for r in delta.tensors)
        unknown = dataclasses.replace(delta, tensors=tuple(rows))
        state = copied(steps[1])
        with pytest.raises(ValueError, match="verify='touched' or 'none'"):
            unknown.revert_(state, verify="full")
        unknown.revert_(state)
        assert same(state, steps[0])


class Holder(nn.Module):
    """Modules around a module, so that it has a dotted path."""

    def __init__(self, path: str, inner: nn.Module) -> None:
        super().__init__()
        head, _, rest = path.partition(".")
        self.add_module(head, Holder(rest, inner) if rest else inner)


class TestNames:
    @pytest.mark.parametrize(
        "path", ["_orig_mod", "module", "_fsdp_wrapped_module", "base_model.model", "model", "a.b"]
    )
    def test_wrappers_and_prefixes(self, net: Net, target: State, delta: Delta, path: str) -> None:
        delta.apply_(Holder(path, net))
        assert same(net.state_dict(), target)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch warns on first use
    def test_compiled(self, net: Net, target: State, delta: Delta) -> None:
        delta.apply_(torch.compile(net))  # type: ignore[arg-type]
        assert same(net.state_dict(), target)

    def test_peft(self, net: Net, target: State, delta: Delta) -> None:
        """PEFT moves an adapted layer to ``base_layer`` and puts its own layers beside it."""
        net.first = Holder("base_layer", net.first)  # type: ignore[assignment]
        net.first.add_module("lora_A", nn.Linear(8, 2))
        delta.apply_(Holder("base_model.model", net))
        found = {name.replace(".base_layer", ""): t for name, t in net.state_dict().items()}
        assert same({name: found[name] for name in target}, target)

    def test_the_delta_has_the_prefix(self, disk: Disk, net: Net, target: State) -> None:
        base = {f"model.{name}": tensor for name, tensor in net.state_dict().items()}
        disk.diff(base, {f"model.{name}": tensor for name, tensor in target.items()}).apply_(net)
        assert same(net.state_dict(), target)

    def test_a_map(self, disk: Disk, net: Net, target: State) -> None:
        base = {f"{name}!": tensor for name, tensor in net.state_dict().items()}
        delta = disk.diff(base, {f"{name}!": tensor for name, tensor in target.items()})
        with pytest.raises(
            StructureMismatch, match=r"'embed.weight!'.*not in the model, nor are 4"
        ):
            delta.apply_(net)
        delta.apply_(net, names=lambda name: name.removesuffix("!"))
        delta.revert_(net, names={name: name[:-1] for name in base})
        assert not same(net.state_dict(), target)

    def test_left_out_by_name_only(self, net: Net, target: State, delta: Delta) -> None:
        before = copied(net.state_dict())
        delta.apply_(net, names={"scale": None})
        assert same(net.state_dict(), {**target, "scale": before["scale"]})

    def test_two_prefixes_that_fit(self, net: Net, delta: Delta) -> None:
        both = nn.ModuleDict({"a": net, "b": Net()})
        with pytest.raises(StructureMismatch, match=r"one of several.*'a\..*'b\..*\(names\)"):
            delta.apply_(both)

    def test_missing(self, net: Net, delta: Delta) -> None:
        state = copied(net.state_dict())
        del state["first.bias"]
        before = copied(state)
        with pytest.raises(StructureMismatch, match=r"'first.bias'.*is not in the model;"):
            delta.apply_(state)
        assert same(state, before)

    def test_a_missing_tensor_that_does_not_change(self, disk: Disk, net: Net) -> None:
        target = tuned(net.state_dict(), "embed.weight")
        delta = disk.diff(net.state_dict(), target)
        state = {"embed.weight": net.embed.weight}
        delta.apply_(state, verify="full")
        assert same(state, {"embed.weight": target["embed.weight"]})


class TestTied:
    def test_tied_tensors_are_written_once(self, disk: Disk) -> None:
        base = {"a": torch.randn(4, 4), "b": torch.zeros(2)}
        base["c"] = base["a"].clone()
        changed = tuned(base, "a")["a"]
        delta = disk.diff(base, {**base, "a": changed, "c": changed.clone()})
        shared = base["a"].clone()
        delta.apply_({"a": shared, "c": shared, "b": base["b"]})
        assert same({"a": shared}, {"a": changed})

    def test_one_name_is_enough(self, disk: Disk) -> None:
        base = {"a": torch.randn(4, 4)}
        target = tuned(base)
        shared = base["a"].clone()
        disk.diff(base, target).apply_({"a": shared, "head": shared})
        assert same({"a": shared}, target)

    @pytest.mark.parametrize("names", [("a",), ("a", "c")])
    def test_tied_tensors_that_change_differently(self, disk: Disk, names: tuple[str, ...]) -> None:
        base = {"a": torch.randn(4, 4)}
        base["c"] = base["a"].clone()
        delta = disk.diff(base, tuned(base, *names))
        shared = base["a"].clone()
        with pytest.raises(StructureMismatch, match="'a' and 'c' are tied in the model"):
            delta.apply_({"a": shared, "c": shared})
        assert same({"a": shared}, {"a": base["a"]})


class TestFiles:
    """Tensors of a model are found by name; tensors of a delta have a file and a name."""

    A, B = "a/x.safetensors", "b/x.safetensors"

    @pytest.fixture
    def base(self) -> State:
        return {"w": torch.randn(4, 4), "v": torch.randn(3)}

    def test_another_division_of_files(self, disk: Disk, base: State) -> None:
        target = tuned(base)
        delta = disk.diff_files(
            {self.A: base}, {self.A: {"w": target["w"]}, self.B: {"v": target["v"]}}
        )
        state = copied(base)
        delta.apply_(state, verify="full")
        assert same(state, target)
        delta.revert_(state, verify="full")
        assert same(state, base)

    @pytest.mark.parametrize("other", [torch.randn(5, 4), torch.randn(4, 4).half()])
    @pytest.mark.parametrize("changed", ["both", "this", "other"])
    def test_the_one_that_fits(
        self, disk: Disk, base: State, other: torch.Tensor, changed: str
    ) -> None:
        """The other file is a variant in another dtype, or a part of the model with the same names."""
        others = {"w": other}
        target = base if changed == "other" else tuned(base)
        other_target = others if changed == "this" else tuned(others)
        delta = disk.diff_files(
            {self.A: others, self.B: base}, {self.A: other_target, self.B: target}
        )
        state = copied(base)
        delta.apply_(state, verify="full")
        assert same(state, target)

    def test_a_variant_that_is_added(self, disk: Disk, base: State) -> None:
        target = tuned(base)
        half = {name: tensor.half() for name, tensor in target.items()}
        delta = disk.diff_files({self.A: base}, {self.A: target, self.B: half})
        state = copied(base)
        delta.apply_(state, verify="full")
        assert same(state, target)
        with pytest.raises(StructureMismatch, match="load the model in F32"):
            delta.apply_({name: tensor.half() for name, tensor in base.items()})

    def test_one_that_changes_rather_than_others(self, disk: Disk, base: State) -> None:
        others = {name: tensor + 1 for name, tensor in base.items()}
        target = tuned(base)
        delta = disk.diff_files({self.A: others, self.B: base}, {self.A: others, self.B: target})
        state = copied(base)
        delta.apply_(state, verify="full")
        assert same(state, target)
        with pytest.raises(BaseMismatch):
            delta.apply_(others)

    def test_either_of_those_that_do_not_change(self, disk: Disk, base: State) -> None:
        others = {**tuned(base, seed=1), "more": torch.zeros(2)}
        target = {**others, "more": torch.ones(2)}
        delta = disk.diff_files({self.A: others, self.B: base}, {self.A: target, self.B: base})
        for state in (base, others):
            model = {**copied(state), "more": torch.zeros(2)}
            delta.apply_(model, verify="full")
            assert same(model, {**state, "more": torch.ones(2)})
        with pytest.raises(BaseMismatch, match="leaves as it is"):
            delta.apply_({**tuned(base, seed=2), "more": torch.zeros(2)}, verify="full")

    def test_copies(self, disk: Disk, base: State) -> None:
        target = tuned(base)
        delta = disk.diff_files({self.A: base, self.B: base}, {self.A: target, self.B: target})
        state = copied(base)
        delta.apply_(state, verify="full")
        assert same(state, target)

    def test_several_that_fit(self, disk: Disk, base: State) -> None:
        others = tuned(base, seed=1)
        target, other_target = tuned(base, seed=2), tuned(others, seed=3)
        delta = disk.diff_files(
            {self.A: others, self.B: base}, {self.A: other_target, self.B: target}
        )
        before = copied(base)
        with pytest.raises(
            StructureMismatch, match=rf"'{self.A}' or of '{self.B}'.*names="
        ) as error:
            delta.apply_(base)
        assert same(base, before)
        assert f"{{('{self.B}', 'v'): None}}" in str(error.value)
        delta.apply_(base, names={row.key: None for row in delta.tensors if row.file == self.A})
        assert same(base, target)
        both = {f"a.{n}": t for n, t in others.items()} | {f"b.{n}": t for n, t in before.items()}
        delta.apply_(both, names={row.key: f"{row.file[0]}.{row.name}" for row in delta.tensors})
        assert same({n: both[f"a.{n}"] for n in others}, other_target)
        assert same({n: both[f"b.{n}"] for n in others}, target)


class TestRenamed:
    """A delta that renames a tensor is refused, unless the model has the tensor under both names."""

    @pytest.fixture
    def base(self) -> State:
        return {"a": torch.randn(4, 4), "b": torch.randn(3)}

    def test_not_in_place(self, disk: Disk, base: State) -> None:
        target = tuned({**base, "copy": base["a"]}, "b")
        delta = disk.diff(base, target)
        before = copied(base)
        for model in (base, {**base, "copy": torch.zeros(4, 4)}, {**base, "copy": before["a"]}):
            with pytest.raises(
                StructureMismatch, match=r"makes tensor 'copy' from tensor 'a'.*load_model"
            ):
                delta.apply_(model)
        assert same(base, before)
        delta.apply_(base, names={"copy": None})
        assert same(base, {name: target[name] for name in base})

    @pytest.mark.parametrize("is_kept", [True, False])
    def test_tied(self, disk: Disk, base: State, is_kept: bool) -> None:
        """Of two tied tensors, some programs save the first, some the second, and some both."""
        target = tuned({**base, "copy": base["a"]}, "b")
        if not is_kept:
            del target["a"]
        delta = disk.diff(base, target)
        model = {**copied(base), "copy": base["a"]}
        model["a"] = model["copy"]
        delta.apply_(model, verify="full")
        assert same(model, {**base, **target})
        delta.revert_(model, verify="full")
        assert same(model, {**base, "copy": base["a"]})
        model["a"][0, 0] = 7
        with pytest.raises(BaseMismatch, match="leaves as it is"):
            delta.apply_(model, verify="full")

    def test_tied_to_one_that_changes(self, disk: Disk, base: State) -> None:
        delta = disk.diff(base, tuned({**base, "copy": base["a"]}, "a"))
        model = {**base, "copy": base["a"]}
        before = copied(model)
        with pytest.raises(StructureMismatch, match="'a' and 'copy' are tied in the model"):
            delta.apply_(model)
        assert same(model, before)

    def test_one_that_changes(self, disk: Disk) -> None:
        base = {f"model.{n}": torch.randn(4, 4) for n in "abc"}
        changed = tuned(base, "model.a")
        target = {name.removeprefix("model."): tensor for name, tensor in changed.items()}
        delta = disk.diff(base, target)
        assert delta.tensors[0].base
        for model in (base, copied(target)):
            with pytest.raises(StructureMismatch, match=r"makes tensor 'a' from tensor 'model.a'"):
                delta.apply_(model)

    def test_removed_tensors_are_left_alone(self, disk: Disk, base: State) -> None:
        target = tuned(base, "b")
        delta = disk.diff(base, {"b": target["b"]})
        delta.apply_(base, verify="full")
        assert same(base, target)


class TestStructure:
    def test_dtype(self, net: Net, delta: Delta) -> None:
        with pytest.raises(
            StructureMismatch,
            match=r"is F32 \[10, 8\] in the model, expected BF16 .*load the model in BF16",
        ):
            delta.apply_(net.float())

    def test_shape(self, net: Net, delta: Delta) -> None:
        net.embed = nn.Embedding(11, 8, dtype=torch.bfloat16)
        with pytest.raises(StructureMismatch, match=r"is BF16 \[11, 8\] in the model") as error:
            delta.apply_(net)
        assert "load the model in" not in str(error.value)

    def test_meta(self, net: Net, delta: Delta) -> None:
        with pytest.raises(StructureMismatch, match="meta"):
            delta.apply_(net.to("meta"))

    @pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
    def test_memory_that_is_read_only(self, disk: Disk) -> None:
        """Without the check, torch would crash the process."""
        base = {"a": torch.randn(4, 3), "b": torch.randn(5000)}
        target = tuned(base)
        delta = disk.diff(base, target)
        raw = np.memmap(disk.save({"b": base["b"]}), np.uint8, mode="r")
        mapped = torch.from_numpy(raw[-20_000:]).view(torch.float32)
        before = copied(base)
        with pytest.raises(StructureMismatch, match="'b' is in read-only memory"):
            delta.apply_({"a": base["a"], "b": mapped})
        assert same({"a": base["a"], "b": mapped}, before)
        raw = np.memmap(disk.save({"b": base["b"]}), np.uint8, mode="c")  # copy on write: writable
        model = {"a": base["a"], "b": torch.from_numpy(raw[-20_000:]).view(torch.float32)}
        delta.apply_(model)
        assert same(model, target)

    def test_expanded(self, disk: Disk) -> None:
        base = {"a": torch.ones(4, 3)}
        delta = disk.diff(base, tuned(base))
        with pytest.raises(StructureMismatch, match="share memory"):
            delta.apply_({"a": torch.ones(1, 3).expand(4, 3)})

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"new": torch.ones(2)}, "adds tensor 'new'"),
            (
                {"embed.weight": torch.ones(11, 8).bfloat16()},
                r"from BF16 \[10, 8\] to BF16 \[11, 8\]",
            ),
            ({"embed.weight": torch.ones(10, 8)}, "replaces tensor 'embed.weight'"),
            ({"scale": torch.ones(1, 3).bfloat16()}, r"from BF16 \[3\] to BF16 \[1, 3\]"),
        ],
    )
    def test_other_structure(self, disk: Disk, net: Net, change: State, match: str) -> None:
        target = {**net.state_dict(), **change}
        with pytest.raises(StructureMismatch, match=rf"{match}.*load_model"):
            disk.diff(net.state_dict(), target).apply_(net)


def test_a_full_check_sees_that_other_elements_of_the_same_bits_are_meant(tmp_path: Path) -> None:
    """The digests of touched elements are the same: equal bits become equal bits."""
    base = {"w": torch.zeros(300, dtype=torch.bfloat16)}
    targets = []
    for position in (3, 4):
        target = {"w": base["w"].clone()}
        target["w"][position] = 1.0
        targets.append(target)
    with sparsedelta.diff(base, targets[0]) as right, sparsedelta.diff(base, targets[1]) as other:
        (row,), (expected,) = other.tensors, right.tensors
        wrong = dataclasses.replace(
            other, tensors=[dataclasses.replace(row, target=expected.target)]
        )
        delta = sparsedelta.Delta.from_bytes(wrong.to_bytes())
    model = {"w": base["w"].clone()}
    with pytest.raises(Corrupt, match=r"'w' would become one with digest .*nothing was written"):
        delta.apply_(model, verify="full")
    assert torch.equal(model["w"], base["w"])
    with sparsedelta.diff(base, targets[0]) as right:
        right.apply_(model, verify="full")
        assert torch.equal(model["w"], targets[0]["w"])
        right.revert_(model, verify="full")
        assert torch.equal(model["w"], base["w"])
