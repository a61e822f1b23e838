"""Wrappers and sharded parameters are refused before the base is looked at, each in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import distributed, nn
from train_helpers import bert_batches, make_bert, make_inputs, make_net, snapshot, square_loss

from sift_train import SIFT, FitConfig, export_delta, fit


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """Make this process a group of one."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


def refused(model: nn.Module, base: Path, tmp_path: Path, **options: Any) -> str:
    """Return the sentence with which ``fit`` refuses a model; nothing is trained or written."""
    with pytest.raises(ValueError, match=r"^(the model|model|parameter) ") as found:
        fit(model, [None], output=tmp_path / "d.sd", base=base, **options)
    assert not (tmp_path / "d.sd").exists()
    assert "\n" not in str(found.value)
    return str(found.value)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Return a base that no model here comes from."""
    other = {name: tensor + 1 for name, tensor in snapshot(make_net()).items()}
    save_file(other, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel(base: Path, tmp_path: Path) -> None:
    wrapped = nn.parallel.DistributedDataParallel(make_net())
    message = refused(wrapped, base, tmp_path)
    assert message.startswith("the model contains a DistributedDataParallel,")
    assert message.endswith("give the model without this wrapper")
    with pytest.raises(ValueError, match="the model contains a DistributedDataParallel"):
        export_delta(wrapped, tmp_path / "d.sd", base=base)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("sharded", ["first", None])
def test_parameters_that_fsdp2_has_sharded(base: Path, tmp_path: Path, sharded: str | None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    model = make_net()
    fully_shard(model if sharded is None else model.get_submodule(sharded), mesh=mesh)
    config = FitConfig(sparse_module=["last"])
    message = refused(model, base, tmp_path, config=config)
    assert message.startswith("parameter 'first.weight' is sharded over several devices;")


def test_model_wrapped_by_torch_compile(base: Path, tmp_path: Path) -> None:
    compiled: Any = torch.compile(make_net(), backend="eager")
    message = refused(compiled, base, tmp_path)
    assert message.startswith("model is wrapped by torch.compile,")
    assert "model.compile()" in message


def test_export_takes_the_model_that_torch_compile_wraps(tmp_path: Path) -> None:
    model = make_net()
    save_file(snapshot(model), tmp_path / "base.safetensors")
    compiled: Any = torch.compile(model, backend="eager")
    with SIFT(compiled, 0.1, ["first.weight"]) as sift:
        optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)
        square_loss(compiled, make_inputs(1)[0]).backward()
        optimizer.step()
        options: dict[str, Any] = {"sift": sift, "base": tmp_path / "base.safetensors"}
        assert export_delta(compiled, tmp_path / "d.sd", **options) == sift.n_trained > 0
        with sift.reverted():
            wrong = {name: t + ("last.weight" in name) for name, t in snapshot(model).items()}
        save_file(wrong, tmp_path / "base.safetensors")
        with pytest.raises(ValueError, match=r"components of 'last\.weight' differ"):
            export_delta(compiled, tmp_path / "e.sd", **options)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # used by PEFT
@pytest.mark.parametrize("way", ["get_peft_model", "inject"])
def test_model_with_adapters(tmp_path: Path, way: str) -> None:
    peft: Any = pytest.importorskip("peft")
    import transformers

    folder = make_bert(tmp_path / "base", torch.float32)
    load: Any = transformers.BertForSequenceClassification
    model = load.from_pretrained(folder)
    config = peft.LoraConfig(r=2, target_modules=["query"])
    make: Any = peft.get_peft_model if way == "get_peft_model" else peft.inject_adapter_in_model
    adapted = make(model, config) if way == "get_peft_model" else make(config, model)
    message = refused(adapted, folder, tmp_path)
    assert message.startswith("the model contains a ")
    assert "of PEFT" in message
    assert "merge_and_unload()" in message
    with pytest.raises(ValueError, match="of PEFT"):
        export_delta(adapted, tmp_path / "d.sd", base=folder)
    if way == "get_peft_model":
        result = fit(
            adapted.merge_and_unload(), bert_batches(1), output=tmp_path / "d.sd", base=folder
        )
        assert result.nnz > 0
