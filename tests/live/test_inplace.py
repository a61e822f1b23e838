"""A delta on a model in memory: exact, checked before anything is written, undone again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    def test_there_and_back(self, net: Net, target: State, delta: Delta, verify: Any) -> None:
        before = copied(net.state_dict())
        delta.apply_(net, verify=verify)
        assert same(net.state_dict(), target)
        delta.revert_(net, verify=verify)
        assert same(net.state_dict(), before)

    def test_for_a_while(self, net: Net, target: State, delta: Delta) -> None:
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
        """A tensor that is partly the target's is neither."""
        state = copied(target)
        changed = (state["last.weight"] != net.state_dict()["last.weight"]).nonzero()[0]
        state["last.weight"][tuple(changed)] = net.state_dict()["last.weight"][tuple(changed)]
        self.check_untouched(state, delta, BaseMismatch, "neither")

    def test_an_inconsistent_delta(self, net: Net, delta: Delta) -> None:
        row = next(row for row in delta.tensors if row.name == "last.weight")
        assert row.change
        assert row.change.touched
        change = dataclasses.replace(row.change, touched=(row.change.touched[0], bytes(8)))
        lie = dataclasses.replace(row, change=change)
        rows = tuple(lie if r is row else r for r in delta.tensors)
        state = copied(net.state_dict())
        self.check_untouched(
            state, dataclasses.replace(delta, tensors=rows), Corrupt, "last.weight"
        )

    def test_unknown_check(self, net: Net, delta: Delta) -> None:
        with pytest.raises(ValueError, match="verify is 'some'"):
            delta.apply_(net, verify="some")  # type: ignore[arg-type]

    def test_not_a_model(self, delta: Delta) -> None:
        with pytest.raises(TypeError, match="model is a list"):
            delta.apply_([])  # type: ignore[arg-type]


class TestStacked:
    """Without its base a stack knows no digests of touched values, and not always of tensors."""

    @pytest.fixture
    def steps(self, disk: Disk, net: Net) -> list[State]:
        first = copied(net.state_dict())
        return [first, tuned(first, seed=1), tuned(tuned(first, seed=1), seed=2)]

    def test_touched_is_not_known(self, disk: Disk, net: Net, steps: list[State]) -> None:
        a, b = disk.diff(steps[0], steps[1]), disk.diff(steps[1], steps[2])
        with sparsedelta.stack(a, b) as stacked:
            with pytest.raises(ValueError, match="verify='full' or 'none'"):
                stacked.apply_(net)
            assert same(net.state_dict(), steps[0])
            stacked.apply_(net, verify="full")
        assert same(net.state_dict(), steps[2])

    def test_full_is_not_known(self, disk: Disk, steps: list[State]) -> None:
        one = {**copied(steps[0]), "scale": steps[1]["scale"]}
        other = {**copied(steps[0]), "first.bias": steps[1]["first.bias"]}
        both = {**one, "first.bias": steps[1]["first.bias"]}
        deltas = disk.diff(steps[0], one), disk.diff(steps[0], other)
        with sparsedelta.stack(*deltas) as stacked:
            state = copied(steps[0])
            stacked.apply_(state, verify="full")
            assert same(state, both)
            with pytest.raises(ValueError, match="verify='touched' or 'none'"):
                stacked.revert_(state, verify="full")
            stacked.revert_(state)
            assert same(state, steps[0])


class Holder(nn.Module):
    """A module within others, at a dotted path."""

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

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on first use
    def test_compiled(self, net: Net, target: State, delta: Delta) -> None:
        delta.apply_(torch.compile(net))  # type: ignore[arg-type]
        assert same(net.state_dict(), target)

    def test_peft(self, net: Net, target: State, delta: Delta) -> None:
        """PEFT moves a layer that it adapts to ``base_layer`` and puts its own beside."""
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

    def test_two_ways(self, net: Net, delta: Delta) -> None:
        both = nn.ModuleDict({"a": net, "b": Net()})
        with pytest.raises(StructureMismatch, match=r"several ways.*'a\..*'b\..*\(names\)"):
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
    def test_once_if_the_delta_ties_them_too(self, disk: Disk) -> None:
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
    def test_not_if_they_part(self, disk: Disk, names: tuple[str, ...]) -> None:
        base = {"a": torch.randn(4, 4)}
        base["c"] = base["a"].clone()
        delta = disk.diff(base, tuned(base, *names))
        shared = base["a"].clone()
        with pytest.raises(StructureMismatch, match="'a' and 'c' are tied in the model"):
            delta.apply_({"a": shared, "c": shared})
        assert same({"a": shared}, {"a": base["a"]})


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

    def test_expanded(self, disk: Disk) -> None:
        base = {"a": torch.ones(4, 3)}
        delta = disk.diff(base, tuned(base))
        with pytest.raises(StructureMismatch, match="share memory"):
            delta.apply_({"a": torch.ones(1, 3).expand(4, 3)})

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"new": torch.ones(2)}, "adds tensor 'new'"),
            ({"first.bias": None}, "removes tensor 'first.bias'"),
            ({"embed.weight": torch.ones(11, 8).bfloat16()}, r"BF16 \[11, 8\] of BF16 \[10, 8\]"),
            ({"embed.weight": torch.ones(10, 8)}, r"F32 \[10, 8\] of BF16"),
        ],
    )
    def test_other_structure(
        self, disk: Disk, net: Net, change: dict[str, torch.Tensor | None], match: str
    ) -> None:
        target = {n: t for n, t in {**net.state_dict(), **change}.items() if t is not None}
        with pytest.raises(StructureMismatch, match=rf"{match}.*load_model"):
            disk.diff(net.state_dict(), target).apply_(net)
