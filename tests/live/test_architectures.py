"""Deltas on models whose checkpoints differ from the module in names, shapes or layout."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from live.architectures import FAMILIES, make_small, step
from live.live_helpers import State, copied, same
from live.model_helpers import change, make, saved
from safetensors.torch import load_file, save_file
from torch import nn

import sparsedelta
from sparsedelta import DeltaBank
from sparsedelta.errors import AlreadyApplied, BaseMismatch, StructureMismatch
from sparsedelta.live import coordinates
from sparsedelta.live.loading import Moved, Renamed, find_loaded

FILE = "model.safetensors"


@dataclass(frozen=True)
class Case:
    """Checkpoints of one model, and the deltas from its base.

    Attributes:
        cls: the class of the model.
        folder: has ``base``, the targets, and a delta ``<target>.sd`` of each.
        states: the state dicts of models loaded from these checkpoints.
    """

    cls: Any
    folder: Path
    states: dict[str, State] = field(default_factory=dict)

    def load(self, which: str) -> Any:
        return self.cls.from_pretrained(self.folder / which, dtype=torch.bfloat16)

    def state(self, which: str) -> State:
        if which not in self.states:
            self.states[which] = self.load(which).state_dict()
        return self.states[which]

    def add(self, target: str, changing: Callable[[Any], None]) -> None:
        model = self.load("base")
        changing(model)
        saved(model, self.folder / target)
        self.diff(target)

    def diff(self, target: str) -> None:
        with sparsedelta.diff(self.folder / "base", self.folder / target) as delta:
            delta.save(self.delta(target))

    def delta(self, target: str) -> Path:
        return self.folder / f"{target}.sd"


def case_of(model: Any, folder: Path, changing: Callable[[Any], None] = change) -> Case:
    saved(model, folder / "base")
    case = Case(type(model), folder)
    saved(case.load("base"), folder / "base")  # some classes keep some tensors in float32
    case.add("target", changing)
    return case


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case_of(make_small(request.param), tmp_path_factory.mktemp(request.param))


def alike(left: torch.Tensor, right: torch.Tensor) -> bool:
    return same({"": left}, {"": right})


class TestFamilies:
    def test_the_file_is_not_the_module(self, case: Case) -> None:
        file, module = load_file(case.folder / "base" / FILE), case.state("base")
        differing = [n for n, t in file.items() if n not in module or not alike(t, module[n])]
        assert differing

    @pytest.mark.parametrize("verify", ["touched", "full"])
    def test_apply_and_revert(self, case: Case, verify: Any) -> None:
        model, base = case.load("base"), case.state("base")
        with sparsedelta.load(case.delta("target")) as delta:
            delta.apply_(model, verify=verify)
            assert same(model.state_dict(), case.state("target"))
            with pytest.raises(AlreadyApplied):
                delta.apply_(model, verify=verify)
            delta.revert_(model, verify=verify)
            assert same(model.state_dict(), base)

    def test_bank(self, case: Case) -> None:
        case.add("other", partial(change, every=5))
        model = case.load("base")
        bank = DeltaBank(model)
        for name in ("target", "other"):
            bank.add(name, case.delta(name))
        for active in ("target", "other", None, "other"):
            bank.activate(active)
            assert same(model.state_dict(), case.state(active or "base"))

    def test_a_small_step(self, case: Case) -> None:
        case.add("step", step)
        model, base = case.load("base"), case.state("base")
        with sparsedelta.load(case.delta("step")) as delta:
            with delta.applied(model):
                assert same(model.state_dict(), case.state("step"))
            assert same(model.state_dict(), base)

    @pytest.mark.parametrize("verify", ["touched", "full"])
    def test_another_base(self, case: Case, verify: Any) -> None:
        model = case.load("base")
        step(model, share=0.5)
        before = copied(model.state_dict())
        with sparsedelta.load(case.delta("target")) as delta, pytest.raises(BaseMismatch):
            delta.apply_(model, verify=verify)
        assert same(model.state_dict(), before)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case_of(make("mixtral"), tmp_path_factory.mktemp("mixtral"))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("MixtralForCausalLM", ".experts."),
        ("NomicBertForMaskedLM", ".Wqkv."),
    ],
)
def test_changes_coded_by_the_base(name: str, part: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128}
    case = case_of(make_small(name, **sizes), tmp_path, step)
    model = case.load("base")
    with sparsedelta.load(case.delta("target")) as delta:
        rows = [row for row in delta.tensors if part in row.name]
        assert any(chunk.coding.classes for row in rows for chunk in row.chunks)
        delta.apply_(model)
    assert same(model.state_dict(), case.state("target"))


def rewrite(case: Case, rule: Callable[[str, torch.Tensor], tuple[str, torch.Tensor]]) -> None:
    """Give the tensors of both files other names or layouts, as in files that transformers did not write."""
    for which in ("base", "target"):
        path = case.folder / which / FILE
        own = load_file(path)
        other = dict(rule(name, tensor) for name, tensor in own.items())
        assert not same(own, other)
        save_file(other, path, {"format": "pt"})
    case.states.clear()
    case.delta("target").unlink()
    case.diff("target")


def test_transposed_experts(tmp_path: Path) -> None:
    case = case_of(make_small("Qwen3VLMoeForConditionalGeneration"), tmp_path, step)
    wanted = case.state("target")
    rewrite(case, lambda n, t: (n, t.transpose(1, 2).contiguous() if ".experts." in n else t))
    assert same(case.state("target"), wanted)
    model = case.load("base")
    with sparsedelta.load(case.delta("target")) as delta:
        delta.apply_(model, verify="full")
        assert same(model.state_dict(), wanted)


def test_legacy_names(tmp_path: Path) -> None:
    case = case_of(make("bert"), tmp_path, lambda model: change(model, skip="pooler"))
    legacy = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    rewrite(case, lambda n, t: (re.sub("|".join(legacy), lambda m: legacy[m[0]], n), t))
    model = case.load("base")
    with sparsedelta.load(case.delta("target")) as delta:
        delta.apply_(model, verify="full")
        assert same(model.state_dict(), case.state("target"))


def test_a_model_without_its_head(mixtral: Case) -> None:
    models = [
        transformers.MixtralModel.from_pretrained(mixtral.folder / which, dtype=torch.bfloat16)
        for which in ("base", "target")
    ]
    with sparsedelta.load(mixtral.delta("target")) as delta:
        names = {"lm_head.weight": None}
        delta.apply_(models[0], names=names)
    assert same(models[0].state_dict(), models[1].state_dict())


def test_a_model_inside_another_module(mixtral: Case) -> None:
    outer = nn.ModuleDict({"inner": mixtral.load("base"), "extra": nn.Linear(2, 2)})
    with sparsedelta.load(mixtral.delta("target")) as delta:
        delta.apply_(outer)
    assert same(outer["inner"].state_dict(), mixtral.state("target"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch itself
def test_a_compiled_model(mixtral: Case) -> None:
    model = mixtral.load("base")
    compiled: Any = torch.compile(model)
    with sparsedelta.load(mixtral.delta("target")) as delta:
        delta.apply_(compiled)
    assert same(model.state_dict(), mixtral.state("target"))


def test_two_models_that_both_fit(mixtral: Case) -> None:
    outer = nn.ModuleList([mixtral.load("base"), mixtral.load("base")])
    with sparsedelta.load(mixtral.delta("target")) as delta:
        with pytest.raises(StructureMismatch, match=r"of '0' or of '1' in the model"):
            delta.apply_(outer)
        delta.apply_(outer, names=lambda name: f"1.{name}")
    assert same(outer[0].state_dict(), mixtral.state("base"))
    assert same(outer[1].state_dict(), mixtral.state("target"))


def test_a_state_dict_has_no_conversion(mixtral: Case) -> None:
    state = mixtral.state("base")
    with (
        sparsedelta.load(mixtral.delta("target")) as delta,
        pytest.raises(StructureMismatch, match=r"is not in the model"),
    ):
        delta.apply_(state)


def test_an_expert_that_the_base_lacks(mixtral: Case, tmp_path: Path) -> None:
    paths = []
    for which in ("base", "target"):
        state = load_file(mixtral.folder / which / FILE)
        lacking = {name: tensor for name, tensor in state.items() if ".experts.3.w1." not in name}
        assert len(lacking) < len(state)
        paths.append(tmp_path / f"{which}.safetensors")
        save_file(lacking, paths[-1])
    model = mixtral.load("base")
    with (
        sparsedelta.diff(*paths) as delta,
        pytest.raises(StructureMismatch, match=r"cannot be changed in the MixtralForCausalLM"),
    ):
        delta.apply_(model)
    assert same(model.state_dict(), mixtral.state("base"))


def test_a_wrong_map_is_an_error(mixtral: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(model: Any, own: Any, given: Any) -> dict[str, Renamed | Moved | Any]:
        found = find_loaded(model, own, given)
        pairs = {
            name: name.replace(".w1.", ".w4.").replace(".w3.", ".w1.").replace(".w4.", ".w3.")
            for name in found
        }
        return {name: found[pairs[name]] for name in found}

    monkeypatch.setattr(coordinates, "find_loaded", swapped)
    model = mixtral.load("base")
    with sparsedelta.load(mixtral.delta("target")) as delta:
        for verify in ("touched", "full"):
            with pytest.raises(BaseMismatch, match=r"experts"):
                delta.apply_(model, verify=verify)
    assert same(model.state_dict(), mixtral.state("base"))
