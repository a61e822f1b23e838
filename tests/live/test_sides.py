"""A model in memory as a side of ``diff``: as the file it would be saved to, or with the files of a folder."""

from __future__ import annotations

import copy
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import assert_same_files, write
from live.live_helpers import Net, State, copied, same, tuned
from live.model_helpers import KINDS, change, make, saved
from safetensors.torch import load_file, save_file

import sparsedelta
from sparsedelta.errors import StructureMismatch
from sparsedelta.live import saved as saved_module
from sparsedelta.live.bits import SAVED_DTYPES, torch_dtype
from sparsedelta.live.saved import SavedState

FILE = "model.safetensors"


def delta_bytes(base: Any, target: Any, **options: Any) -> bytes:
    with sparsedelta.diff(base, target, **options) as delta:
        return delta.to_bytes()


def applied(base: Path, data: bytes, out: Path) -> Path:
    with sparsedelta.Delta.from_bytes(data) as delta:
        sparsedelta.apply(base, delta, out)
    return out


def every_dtype() -> State:
    """Return a tensor of random bits for every dtype of torch, with NaNs of all kinds."""
    generator = torch.Generator().manual_seed(3)
    raw = torch.randint(0, 256, (2400,), dtype=torch.uint8, generator=generator)
    state = {"bool": torch.rand(30, generator=generator) > 0.5}
    for name in SAVED_DTYPES:
        dtype = torch_dtype(sparsedelta_dtype(name))
        if dtype is not None and name != "BOOL":
            with suppress(NotImplementedError):  # torch 2.8 cannot copy F4
                state[f"{name}.w"] = raw.view(dtype)[:120].reshape(4, 30).clone()
    return state


def sparsedelta_dtype(name: str) -> Any:
    from sparsedelta.dtypes import DTYPES

    return DTYPES[name]


@pytest.fixture(params=["new", "loaded"])
def is_loaded(request: pytest.FixtureRequest) -> bool:
    """Whether the model was loaded from disk; transformers then remembers the names of its checkpoint."""
    return bool(request.param == "loaded")


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_models(kind: str, is_loaded: bool, tmp_path: Path) -> None:
    model = make(kind)
    if is_loaded:
        path = saved(model, tmp_path / "first")
        model = type(model).from_pretrained(path, dtype=model.dtype)
    old, base = copy.deepcopy(model), saved(model, tmp_path / "base")
    change(model)
    target = saved(model, tmp_path / "target")
    folders = delta_bytes(base, target)
    files = delta_bytes(base / FILE, target / FILE)
    assert delta_bytes(base, model) == folders
    for left in (old, base / FILE):
        for right in (model, target / FILE):
            assert delta_bytes(left, right) == files
    assert delta_bytes(model, old) == delta_bytes(target / FILE, base / FILE)
    assert_same_files(target, applied(base, folders, tmp_path / "out"))
    assert_same_files(target / FILE, applied(base / FILE, files, tmp_path / "out.safetensors"))


@pytest.mark.parametrize("kind", ["tied llama", "mixtral"])
def test_shards(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    base = saved(model, tmp_path / "base", max_shard_size="6KB")
    write(base / "tokenizer.json", "{}")
    assert len([*base.glob("*.safetensors")]) > 1
    change(model)
    target = saved(model, tmp_path / "target", max_shard_size="6KB")
    write(target / "tokenizer.json", "{}")
    delta = delta_bytes(base, model)
    assert delta == delta_bytes(base, target)
    assert_same_files(target, applied(base, delta, tmp_path / "out"))


def test_a_model_as_the_base_of_a_folder(tmp_path: Path) -> None:
    model = make("mixtral")
    base = saved(model, tmp_path / "base")
    target_model = copy.deepcopy(model)
    change(target_model)
    target = saved(target_model, tmp_path / "target")
    delta = delta_bytes(model, target)
    assert_same_files(target, applied(base / FILE, delta, tmp_path / "out"))


def test_a_checkpoint_with_legacy_names(tmp_path: Path) -> None:
    base = saved(make("bert"), tmp_path / "base")
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    old = load_file(base / FILE)
    for new_name, old_name in names.items():
        old = {name.replace(new_name, old_name): tensor for name, tensor in old.items()}
    save_file(old, base / FILE, {"format": "pt"})
    model = transformers.BertForSequenceClassification.from_pretrained(base, dtype=torch.bfloat16)
    change(model)
    delta = delta_bytes(base, model)
    with sparsedelta.Delta.from_bytes(delta) as opened:
        assert [row.name for row in opened.tensors] == sorted(old)
    rebuilt = load_file(applied(base, delta, tmp_path / "out") / FILE)
    spelled = {n: n for n in model.state_dict()}
    for new_name, old_name in names.items():
        spelled = {n: own.replace(new_name, old_name) for n, own in spelled.items()}
    assert same(rebuilt, {own: model.state_dict()[n] for n, own in spelled.items()})
    bare = transformers.BertModel.from_pretrained(base, dtype=torch.bfloat16)
    with pytest.raises(StructureMismatch, match=r"the BertModel lacks; .*\(strict=False\)$"):
        sparsedelta.diff(base, bare)
    change(bare, every=3)
    rebuilt = load_file(applied(base, delta_bytes(base, bare, strict=False), tmp_path / "b") / FILE)
    head = {n: t for n, t in load_file(base / FILE).items() if n.startswith("classifier")}
    own = bare.state_dict()
    body = {old: own[n.removeprefix("bert.")] for n, old in spelled.items() if old not in head}
    assert same(rebuilt, head | body)


def test_options_are_those_of_files(tmp_path: Path) -> None:
    model = make("llama")
    base = saved(model, tmp_path / "base")
    change(model, every=2)
    target = saved(model, tmp_path / "target")
    options: dict[str, Any] = {"values": "target", "level": "fast", "standalone": True}
    options |= {"base_id": "org/base@1", "info": {"step": 3}, "exclude": ["config.json"]}
    assert delta_bytes(base, model, **options) == delta_bytes(base, target, **options)


def test_a_training_step_leaves_the_sides_exact(tmp_path: Path) -> None:
    model = make("tied llama", dtype=torch.float32)
    base = saved(model, tmp_path / "base")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.arange(12).view(2, 6)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    delta = delta_bytes(base, model)
    assert_same_files(saved(model, tmp_path / "target"), applied(base, delta, tmp_path / "out"))


def test_fused_experts_are_converted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("mixtral")
    state = SavedState(model)
    converted = []
    revert = saved_module._revert

    def counted(model: Any, tensors: State) -> State:
        converted.append([*tensors])
        return revert(model, tensors)

    monkeypatch.setattr(saved_module, "_revert", counted)
    memory = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    for name in sorted(state.specs):
        is_copy = state.read(name).untyped_storage().data_ptr() not in memory
        assert is_copy == (
            ".w1." in name or ".w3." in name
        )  # not contiguous, because they are fused
    assert sorted(map(len, converted)) == [1] * 4  # two tensors of each of two layers


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script_method.*:DeprecationWarning"
)  # of torch.compile
def test_wrapped_models(tmp_path: Path) -> None:
    model = make("mixtral")
    expected = delta_bytes(model, model)
    assert delta_bytes(torch.compile(model), torch.nn.DataParallel(model)) == expected


@pytest.mark.parametrize("give", [lambda net: net, lambda net: net.state_dict()])
def test_other_modules(give: Any, tmp_path: Path) -> None:
    net = Net()
    save_file(net.state_dict(), tmp_path / FILE)
    (tmp_path / "new").mkdir()
    target = tuned(net.state_dict())
    save_file(target, tmp_path / "new" / FILE)
    expected = delta_bytes(tmp_path / FILE, tmp_path / "new" / FILE)
    net.load_state_dict(target)
    assert delta_bytes(tmp_path / FILE, give(net)) == expected
    out = applied(tmp_path / FILE, expected, tmp_path / "out.safetensors")
    assert same(load_file(out), target)


def test_every_dtype(tmp_path: Path) -> None:
    base = every_dtype()
    assert {t.dtype for t in base.values()} >= {torch.float8_e4m3fn, torch.bool, torch.bfloat16}
    target = tuned(base, *(name for name in base if name != "bool"))
    target["bool"] = ~base["bool"]
    (tmp_path / "new").mkdir()
    save_file(base, tmp_path / FILE)
    save_file(target, tmp_path / "new" / FILE)
    delta = delta_bytes(base, target)
    assert delta == delta_bytes(tmp_path / FILE, tmp_path / "new" / FILE)
    out = applied(tmp_path / FILE, delta, tmp_path / "out.safetensors")
    assert_same_files(tmp_path / "new" / FILE, out)


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.t(),
        lambda t: t[:, ::2],
        lambda t: t[1:3],
        lambda t: t[:1].expand(3, -1),
        lambda t: t[0, 0],
        lambda t: t[:0],
    ],
    ids=["transposed", "strided", "part", "expanded", "scalar", "empty"],
)
def test_views(view: Any) -> None:
    whole = torch.arange(60, dtype=torch.float32).view(6, 10)
    base, target = view(whole), view(whole + 0.5)
    plain = delta_bytes({"w": base.clone().contiguous()}, {"w": target.clone().contiguous()})
    assert delta_bytes({"w": base}, {"w": target}) == plain


def test_conjugated_and_negated() -> None:
    numbers = torch.tensor([1 + 2j, 3 - 4j])
    plain = {"c": torch.tensor([1 - 2j, 3 + 4j]), "n": torch.tensor([-2.0, 4.0]).neg()}
    lazy = {"c": numbers.conj(), "n": torch.tensor([1 - 2j, 3 + 4j]).conj().imag.neg().neg()}
    lazy["n"] = numbers.conj().imag
    plain["n"] = lazy["n"].resolve_neg().clone()
    assert lazy["n"].is_neg()
    assert lazy["c"].is_conj()
    assert delta_bytes({"c": numbers, "n": plain["n"]}, lazy) == delta_bytes(
        {"c": numbers, "n": plain["n"]}, plain
    )


def test_shared_storage() -> None:
    memory = torch.arange(40, dtype=torch.float32)
    state = {"a": memory[:20], "b": memory[10:30].view(4, 5), "c": memory[:20]}
    base = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    assert delta_bytes(base, state) == delta_bytes(base, copied(state))


def test_a_state_dict_with_tied_tensors_in_a_folder(tmp_path: Path) -> None:
    model = make("tied llama")
    base = saved(model, tmp_path / "base")
    assert "lm_head.weight" in model.state_dict()
    assert "lm_head.weight" not in load_file(base / FILE)
    change(model)
    expected = delta_bytes(base, saved(model, tmp_path / "target"))
    assert delta_bytes(base, model.state_dict()) == expected
    untied = copied(model.state_dict())
    with pytest.raises(StructureMismatch, match=r"has tensor 'lm_head\.weight', which .* lacks"):
        delta_bytes(base, untied)


def test_a_folder_that_has_tied_tensors_twice(tmp_path: Path) -> None:
    model = make("tied llama")
    folders = {}
    for name in ("base", "target"):
        folders[name] = saved(model, tmp_path / name)
        save_file(copied(model.state_dict()), folders[name] / FILE, {"format": "pt"})
        change(model) if name == "base" else None
    delta = delta_bytes(folders["base"], model)
    assert delta == delta_bytes(folders["base"], folders["target"])
    out = applied(folders["base"], delta, tmp_path / "out")
    assert_same_files(folders["target"], out)


class TestRefused:
    def test_another_dtype(self, tmp_path: Path) -> None:
        base = saved(make("llama"), tmp_path / "base")
        with pytest.raises(StructureMismatch, match=r"is F32 .* in memory and BF16") as caught:
            sparsedelta.diff(base, make("llama", dtype=torch.float32))
        assert caught.value.tensor is not None

    def test_a_missing_tensor(self, tmp_path: Path) -> None:
        model = make("llama")
        base = saved(model, tmp_path / "base")
        change(model)
        target = saved(model, tmp_path / "target")
        state = {n: t for n, t in model.state_dict().items() if "layers.1" not in n}
        with pytest.raises(StructureMismatch, match=r"lacks.*strict=False"):
            sparsedelta.diff(base, state)
        mixed = load_file(target / FILE) | {
            n: t for n, t in load_file(base / FILE).items() if "layers.1" in n
        }
        save_file(mixed, target / FILE, {"format": "pt"})
        assert delta_bytes(base, state, strict=False) == delta_bytes(base, target)

    def test_no_tensor_in_common(self, tmp_path: Path) -> None:
        base = saved(make("llama"), tmp_path / "base")
        with pytest.raises(StructureMismatch, match="lacks"):
            sparsedelta.diff(base, {"other": torch.zeros(3)}, strict=False)

    def test_another_architecture(self, tmp_path: Path) -> None:
        base = saved(make("mixtral"), tmp_path / "base")
        with pytest.raises(StructureMismatch):
            sparsedelta.diff(base, make("llama"))

    def test_two_tensors_of_one_name(self, tmp_path: Path) -> None:
        base = saved(make("llama"), tmp_path / "base")
        save_file(load_file(base / FILE), base / "copy.safetensors")
        with pytest.raises(StructureMismatch, match="leave out one of the files"):
            sparsedelta.diff(base, make("llama"))
        delta_bytes(base, make("llama"), exclude=["copy.safetensors"])

    @pytest.mark.parametrize(
        ("tensor", "problem"),
        [
            (torch.empty(3, device="meta"), "meta device"),
            (torch.zeros(3).to_sparse(), "not a plain tensor"),
            (torch.zeros(3, dtype=torch.complex128), "cannot be saved"),
            ([1, 2], "expected a tensor"),
        ],
        ids=["meta", "sparse", "complex128", "list"],
    )
    def test_tensors_that_cannot_be_saved(self, tensor: Any, problem: str) -> None:
        with pytest.raises(StructureMismatch, match=problem) as caught:
            sparsedelta.diff({"w": torch.zeros(3)}, {"w": tensor})
        assert caught.value.tensor == "w"

    @pytest.mark.parametrize("side", [3, b"path", None, [torch.zeros(3)]])
    def test_objects_that_are_not_models(self, side: Any) -> None:
        with pytest.raises(
            TypeError, match=r"expected a path, a state dict or a torch\.nn\.Module"
        ):
            sparsedelta.diff({"w": torch.zeros(3)}, side)

    def test_quantized_models(self) -> None:
        model = make("llama")
        model.hf_quantizer = object()
        with pytest.raises(StructureMismatch, match="is quantized; save the model"):
            sparsedelta.diff(model, model)

    def test_models_with_adapters(self) -> None:
        model = make("llama")
        model._hf_peft_config_loaded = True
        with pytest.raises(StructureMismatch, match="has adapters"):
            sparsedelta.diff(model, model)

    def test_tied_tensors_that_transformers_does_not_know(self) -> None:
        model = make("llama")
        model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
        with pytest.raises(StructureMismatch, match="cannot save the tied tensors"):
            sparsedelta.diff(model, model)

    def test_conversions_that_need_data(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def revert(model: Any, tensors: State) -> State:
            return {n: t * float(t.view(-1)[0].item()) for n, t in tensors.items()}

        monkeypatch.setattr(saved_module, "_revert", revert)
        with pytest.raises(StructureMismatch, match="for saving needs its data"):
            sparsedelta.diff(make("llama"), make("llama"))


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        sparsedelta.Snapshot({"w": torch.zeros(2)}, folder=tmp_path / "nowhere")
