"""TRL's trainer publishes to a channel through its own weight transfer protocol."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate  # type: ignore[import-untyped]
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState  # type: ignore[import-untyped]
from channel.parties import MemoryStore

import sparsedelta
from sparsedelta.channel.receivers.trl import ChannelTransfer
from sparsedelta.errors import StructureMismatch

pytest.importorskip("trl")


@pytest.fixture(scope="module")
def trl() -> Any:
    """Return the module of TRL's asynchronous trainer, which warns that it is experimental."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.async_grpo import async_grpo_trainer
    return async_grpo_trainer


@pytest.fixture(scope="module")
def begin(trl: Any) -> Iterator[Callable[[Any, ChannelTransfer], Any]]:
    """Return a function that makes TRL's trainer, without a server for rollouts, and begins the training.

    The trainer has only what its weight sync needs.
    """
    accelerator = accelerate.Accelerator(cpu=True)

    def begin(model: Any, transfer: ChannelTransfer) -> Any:
        trainer = object.__new__(trl.AsyncGRPOTrainer)
        trainer.accelerator, trainer.model, trainer.weight_transfer = accelerator, model, transfer
        trainer._lora_sync, trainer.rollout_worker, trainer.model_version = False, None, 0
        trainer._metrics = {"train": defaultdict(list)}
        trl._TrainBeginCallback(trainer).on_train_begin(None, None, None)
        return trainer

    yield begin
    AcceleratorState._reset_state(reset_partial_state=True)


def make(seed: int, *, experts: bool = False) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    torch.manual_seed(seed)
    if experts:
        config = transformers.MixtralConfig(**sizes, num_local_experts=4)
        mixtral: Any = transformers.MixtralForCausalLM(config)
        return mixtral.to(torch.bfloat16)
    llama: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    return llama.to(torch.bfloat16)


def train(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1)[::13] += 1


def same(one: Any, other: Any) -> bool:
    return all(
        torch.equal(a.view(torch.int16), b.view(torch.int16))
        for a, b in zip(one.parameters(), other.parameters(), strict=True)
    )


def test_the_transfer_has_the_methods_of_the_protocol(trl: Any) -> None:
    members = {n: m for n, m in vars(trl.WeightTransferProtocol).items() if inspect.isfunction(m)}
    wanted = {n: m for n, m in members.items() if not n.startswith("_")}
    assert len(wanted) == 5
    for name, method in wanted.items():
        own = inspect.signature(getattr(ChannelTransfer, name))
        assert [*own.parameters] == [*inspect.signature(method).parameters], name


@pytest.mark.parametrize("gives_model", [False, True])
def test_engines_follow_a_trainer(begin: Any, *, gives_model: bool) -> None:
    channel, model, held = sparsedelta.Channel(MemoryStore()), make(0), make(1)
    follower = sparsedelta.Follower(channel, held)
    seen: list[Any] = []

    def note(entry: Any) -> None:
        seen.append(entry.step)
        assert follower.sync().version == entry.version
        assert same(held, model)

    transfer = ChannelTransfer(
        channel,
        model=model if gives_model else None,
        notify=note,
        pause=lambda: seen.append("pause"),
        resume=lambda: seen.append("resume"),
    )
    trainer = begin(model, transfer)
    for _ in range(3):
        train(model)
        trainer._sync_weight()
    transfer.destroy()
    assert seen == [one for step in range(4) for one in ("pause", step, "resume")]
    assert trainer.model_version == 4
    log = channel.log()
    assert [entry.delta is not None for entry in log] == [True, True, True, False]


def test_a_model_gives_the_names_of_its_checkpoint(begin: Any, tmp_path: Path) -> None:
    """Experts are fused in the module and apart in a checkpoint."""
    model = make(0, experts=True)
    channel = sparsedelta.Channel(tmp_path / "channel")
    transfer = ChannelTransfer(channel, model=model)
    trainer = begin(model, transfer)
    train(model)
    trainer._sync_weight()
    transfer.destroy()
    model.save_pretrained(tmp_path / "saved")
    sparsedelta.Follower(channel, tmp_path / "out.safetensors").sync()
    saved = (tmp_path / "saved" / "model.safetensors").read_bytes()
    assert (tmp_path / "out.safetensors").read_bytes() == saved
    assert b"experts.3.w2" in saved


def test_without_notify_versions_are_stored_behind_the_trainer(begin: Any) -> None:
    channel, model, held = sparsedelta.Channel(MemoryStore()), make(0), make(1)
    transfer = ChannelTransfer(channel)
    trainer = begin(model, transfer)
    for _ in range(2):
        train(model)
        trainer._sync_weight()
    transfer.destroy()
    sparsedelta.Follower(channel, held).sync()
    assert same(held, model)
    assert [entry.step for entry in channel.log()] == [2, 1, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sent: sent.pop("b"), "'b' was sent before and is not sent now"),
        (lambda sent: sent.update(c=torch.zeros(2)), "'c' is sent as"),
        (lambda sent: sent.update(b=torch.zeros(3)), "'b' is sent as"),
    ],
)
def test_other_tensors_than_before_are_refused(
    change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    channel = sparsedelta.Channel(MemoryStore())
    transfer = ChannelTransfer(channel)
    sent = {"a": torch.ones(4), "b": torch.ones(2)}
    transfer.send_weights(iter(sent.items()))
    change(sent)
    with pytest.raises(StructureMismatch, match=message):
        transfer.send_weights(iter(sent.items()))
    transfer.destroy()
    assert len(channel.log()) == 1
