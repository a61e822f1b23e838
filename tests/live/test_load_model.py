"""``load_model`` returns the same model as ``from_pretrained`` on the target."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import assert_same_files, state
from live.live_helpers import copied, same, tuned
from safetensors.torch import load_file, save_file
from train_helpers import make_bert

import sparsedelta
from sparsedelta import load_model
from sparsedelta.errors import AlreadyApplied, BaseMismatch, LimitExceeded, StructureMismatch
from sparsedelta.live.load_model import model_files

Bert = transformers.AutoModelForSequenceClassification


def make_llama(path: Path, *, tied: bool) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(path)
    return path


def save_tuned(base: Path, target: Path, model_class: Any, **options: Any) -> Path:
    model = model_class.from_pretrained(base)
    tied = {n for n, _ in model.named_parameters()}  # one of the tied names
    changed = tuned(model.state_dict(), *tied)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(changed[name])
    model.save_pretrained(target, **options)
    for path in base.iterdir():
        if path.is_file() and not (target / path.name).exists() and path.suffix != ".safetensors":
            shutil.copy(path, target)
    return target


def delta_of(base: Path, target: Path, path: Path, **options: Any) -> Path:
    with sparsedelta.diff(base, target, **options) as delta:
        delta.save(path)
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_bert(tmp_path / "base", torch.bfloat16)


@pytest.fixture
def target(base: Path, tmp_path: Path) -> Path:
    return save_tuned(base, tmp_path / "target", Bert)


@pytest.fixture
def path(base: Path, target: Path, tmp_path: Path) -> Path:
    return delta_of(base, target, tmp_path / "delta.sd")


@pytest.mark.parametrize("verify", ["full", "touched", "none"])
def test_the_loaded_model_is_the_target(base: Path, target: Path, path: Path, verify: Any) -> None:
    before = state(base)
    model = load_model(path, base=base, verify=verify)
    assert type(model) is type(Bert.from_pretrained(target))
    assert same(model.state_dict(), Bert.from_pretrained(target).state_dict())
    assert not model.training
    assert state(base) == before


def test_a_folder_or_a_loaded_delta(base: Path, target: Path, path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(path, folder)
    wanted = Bert.from_pretrained(target).state_dict()
    assert same(load_model(folder, base=base).state_dict(), wanted)
    with sparsedelta.load(path) as delta:
        assert same(load_model(delta, base=base, model_class=Bert).state_dict(), wanted)
    shutil.copy(path, folder / "other.sd")
    with pytest.raises(ValueError, match=r"holds 2 \.sd files"):
        load_model(folder, base=base)


@pytest.mark.parametrize("tied", [True, False])
def test_sharded_and_tied(tmp_path: Path, tied: bool) -> None:
    base = make_llama(tmp_path / "base", tied=tied)
    cls = transformers.AutoModelForCausalLM
    target = save_tuned(base, tmp_path / "target", cls, max_shard_size="4KB")
    assert len(list(target.glob("*.safetensors"))) > 1
    path = delta_of(base, target, tmp_path / "delta.sd")
    model = load_model(path, base=base)
    assert same(model.state_dict(), cls.from_pretrained(target).state_dict())
    tokens = torch.arange(5)[None]
    assert torch.equal(model(tokens).logits, cls.from_pretrained(target)(tokens).logits)


def test_other_structure_and_configuration(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base", tied=False)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(44)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "target")
    path = delta_of(base, tmp_path / "target", tmp_path / "delta.sd")
    found = load_model(path, base=base)
    assert same(found.state_dict(), model.state_dict())
    assert found.config.vocab_size == 44
    assert found.generation_config.max_new_tokens == 7


def test_another_dtype(base: Path, target: Path, path: Path) -> None:
    model = load_model(path, base=base, dtype=torch.float32)
    assert same(model.state_dict(), Bert.from_pretrained(target, dtype=torch.float32).state_dict())


def test_options(base: Path, path: Path) -> None:
    model = load_model(path, base=base, options={"attn_implementation": "eager"})
    assert model.config._attn_implementation == "eager"


class TestWhichFiles:
    """The names of weight files and indexes show which files hold the model's tensors."""

    @pytest.mark.parametrize(
        ("paths", "found"),
        [
            ("model", "model"),
            ("a", "a"),
            ("model adapter consolidated", "model"),
            ("model pytorch_model", "model"),
            ("pytorch_model adapter", "pytorch_model"),
            ("diffusion_pytorch_model adapter", "diffusion_pytorch_model"),
            ("model model.fp16", "model"),
            ("model.fp16", "model.fp16"),
            ("gpt2.5", "gpt2.5"),
            (
                "model-00001-of-00002 model-00002-of-00002 model.fp16",
                "model-00001-of-00002 model-00002-of-00002",
            ),
            ("model model-00001-of-00001", "model"),
            ("model.fp16-00001-of-00002 model.fp16-00002-of-00002",) * 2,
        ],
    )
    def test_by_path(self, paths: str, found: str) -> None:
        assert model_files(files(paths), {}) == files(found)

    @pytest.mark.parametrize(
        ("indexes", "found"),
        [
            ({"model": "b c"}, "b c"),
            ({"model": "a b", "other": "c"}, "a b"),
            ({"model.fp16": "a b", "model": "c"}, "c"),
            ({"model.fp16": "a b c"}, "a b c"),
        ],
    )
    def test_by_index(self, indexes: dict[str, str], found: str) -> None:
        named = {f"{k}.safetensors.index.json": files(v) for k, v in indexes.items()}
        assert model_files(files("a b c"), named) == files(found)

    @pytest.mark.parametrize(
        ("paths", "message"),
        [
            ("a b", r"for several purposes \('a', 'b'\)"),
            ("model.fp16 model.bf16", r"in several variants \('model.bf16', 'model.fp16'\)"),
            ("", "only in subfolders"),
        ],
    )
    def test_not_clear(self, paths: str, message: str) -> None:
        with pytest.raises(ValueError, match=rf"{message}.*apply the delta"):
            model_files(files(paths), {})

    def test_beside_other_weights(self, base: Path, target: Path, tmp_path: Path) -> None:
        for folder in (base, target):
            raw = load_file(folder / "model.safetensors")
            halves = {name: tensor.half() for name, tensor in raw.items()}
            save_file(halves, folder / "model.fp16.safetensors")
            save_file({n: t + 1 for n, t in raw.items()}, folder / "original.safetensors")
            (folder / "onnx").mkdir()
            save_file(halves, folder / "onnx" / "model.safetensors")
        path = delta_of(base, target, tmp_path / "delta.sd")
        wanted = Bert.from_pretrained(target).state_dict()
        assert same(load_model(path, base=base).state_dict(), wanted)

    @pytest.mark.parametrize("is_in_base", [True, False])
    def test_an_index_of_unnumbered_shards(self, tmp_path: Path, is_in_base: bool) -> None:
        base = make_llama(tmp_path / "base", tied=False)
        cls = transformers.AutoModelForCausalLM
        target = save_tuned(base, tmp_path / "target", cls, max_shard_size="4KB")
        wanted = cls.from_pretrained(target).state_dict()
        index = target / "model.safetensors.index.json"
        text = index.read_text()
        for number, shard in enumerate(sorted(target.glob("model-*.safetensors"))):
            text = text.replace(shard.name, f"part{number}.safetensors")
            shard.rename(target / f"part{number}.safetensors")
        index.write_text(text)
        save_file({"w": torch.zeros(2)}, target / "adapter.safetensors")
        if is_in_base:
            shutil.copytree(target, tmp_path / "base2")
            base = tmp_path / "base2"
        path = delta_of(base, target, tmp_path / "delta.sd")
        told = nullcontext() if is_in_base else pytest.warns(UserWarning, match="'w' of 'adapter.")
        with told:
            assert same(load_model(path, base=base).state_dict(), wanted)


def files(names: str) -> set[str]:
    return {f"{name}.safetensors" for name in names.split()}


class TestTensorsThatTheModelDoesNotHold:
    """The loaded model has the tensors of one folder. The delta may change others, with a warning."""

    @pytest.fixture
    def dense(self, base: Path, target: Path) -> str:
        """Add the weights of another module to base and target, as sentence-transformers does."""
        name = "2_Dense/model.safetensors"
        for folder, step in ((base, 0), (target, 1)):
            (folder / "2_Dense").mkdir()
            parts = {f"linear.{n}": torch.zeros(3) + step for n in range(5)}
            save_file({**parts, "fixed": torch.ones(2)}, folder / name)
        return name

    def test_of_another_module(self, base: Path, target: Path, tmp_path: Path, dense: str) -> None:
        path = delta_of(base, target, tmp_path / "delta.sd")
        told = "".join(f"'linear.{n}' of '{dense}'[, ]+" for n in range(3)) + "and 2 more; to use"
        with pytest.warns(UserWarning, match=f"does not hold, {told}") as caught:
            model = load_model(path, base=base)
        assert [warning.filename for warning in caught] == [__file__]
        assert same(model.state_dict(), Bert.from_pretrained(target).state_dict())

    def test_that_do_not_change(self, base: Path, target: Path, tmp_path: Path, dense: str) -> None:
        shutil.copy(base / dense, target / dense)
        load_model(delta_of(base, target, tmp_path / "delta.sd"), base=base)  # warnings are errors

    def test_of_a_larger_model(self, base: Path, path: Path) -> None:
        with pytest.warns(
            UserWarning, match=r"hold, 'classifier.bias' of .*, 'classifier.weight' of"
        ):
            load_model(path, base=base, model_class=transformers.AutoModel)

    def test_tied(self, tmp_path: Path) -> None:
        """A file may have both of two tied tensors. Transformers reads one of them."""
        base = make_llama(tmp_path / "base", tied=True)
        target = save_tuned(base, tmp_path / "target", transformers.AutoModelForCausalLM)
        for folder in (base, target):
            weights = load_file(folder / "model.safetensors")
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
            save_file(weights, folder / "model.safetensors", {"format": "pt"})
        load_model(delta_of(base, target, tmp_path / "delta.sd"), base=base)


class TestWrongBase:
    def test_content(self, base: Path, path: Path, tmp_path: Path) -> None:
        other = save_tuned(base, tmp_path / "other", Bert)
        weights = other / "model.safetensors"
        raw = bytearray(weights.read_bytes())
        raw[-40] ^= 1
        weights.write_bytes(raw)
        with pytest.raises(BaseMismatch):
            load_model(path, base=other)

    def test_the_target(self, target: Path, path: Path) -> None:
        with pytest.raises(AlreadyApplied):
            load_model(path, base=target)

    def test_structure(self, path: Path, tmp_path: Path) -> None:
        with pytest.raises(StructureMismatch):
            load_model(path, base=make_llama(tmp_path / "other", tied=False))


def test_no_configuration(base: Path, target: Path, tmp_path: Path) -> None:
    files = (base / "model.safetensors", target / "model.safetensors")
    path = delta_of(*files, tmp_path / "file.sd")
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_model(path, base=files[0])


def test_a_changed_model_is_saved_as_apply_writes_it(
    base: Path, target: Path, path: Path, tmp_path: Path
) -> None:
    """The base is saved by the same code, so the files can be compared byte for byte."""
    model: Any = Bert.from_pretrained(base)
    before = copied(model.state_dict())
    with sparsedelta.load(path) as delta:
        delta.apply_(model, verify="full")
        model.save_pretrained(tmp_path / "saved")
        sparsedelta.apply(base, delta, tmp_path / "applied")
        saved, applied = tmp_path / "saved", tmp_path / "applied"
        assert (saved / "model.safetensors").read_bytes() == (
            applied / "model.safetensors"
        ).read_bytes()
        assert_same_files(target, applied)
        delta.revert_(model)
    assert same(model.state_dict(), before)


def test_a_model_of_the_inner_part(base: Path, target: Path, path: Path) -> None:
    """The names in the checkpoint have a prefix that the names of the inner model lack."""
    names = [name for name, _ in Bert.from_pretrained(base).named_parameters()]
    model: Any = transformers.AutoModel.from_pretrained(base, add_pooling_layer=True)
    with sparsedelta.load(path) as delta:
        with pytest.raises(StructureMismatch, match="classifier"):
            delta.apply_(model)
        delta.apply_(model, names={n: None for n in names if n.startswith("classifier")})
    wanted = transformers.AutoModel.from_pretrained(target, add_pooling_layer=True)
    assert same(model.state_dict(), wanted.state_dict())


def test_a_tensor_of_any_size(base: Path, tmp_path: Path) -> None:
    """A delta of one kilobyte may state a tensor of any size."""
    with sparsedelta.load(delta_of(base, base, tmp_path / "delta.sd")) as delta:
        target = dataclasses.replace(delta.tensors[0].target, shape=(1 << 58,))
        rows = (dataclasses.replace(delta.tensors[0], target=target), *delta.tensors[1:])
        with pytest.raises(LimitExceeded):
            load_model(dataclasses.replace(delta, tensors=rows), base=base)


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_packages_that_are_not_installed(
    base: Path, path: Path, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    install = r"pip install 'sparsedelta\[train\]'"
    with pytest.raises(ModuleNotFoundError, match=f"need {missing}, which is not.*{install}$"):
        load_model(path, base=base)
    if missing == "torch":
        with (
            sparsedelta.load(path) as delta,
            pytest.raises(ModuleNotFoundError, match="need torch"),
        ):
            delta.apply_({})
