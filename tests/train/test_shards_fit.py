"""``fit`` on a model that FSDP2 has sharded is compared with ``fit`` in one process."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_helpers import RankPool
from safetensors.torch import load_file, save_file
from test_shards import State, make_odd, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from train_helpers import make_bert, make_inputs, same_bits, square_loss

import sparsedelta
from sift_train import SIFT, FitConfig, FitResult, SiftCallback, SiftTrainerMixin, fit


class StopHereError(Exception):
    pass


@pytest.fixture(scope="module")
def pool_of_four() -> Iterator[RankPool]:
    made = RankPool(4)
    yield made
    made.close()


def config(**more: Any) -> FitConfig:
    given: dict[str, Any] = {
        "sparse_rate": 0.2,
        "lr": 1e-2,
        "selection": "random",
        "selection_batches": 3,
        "epochs": 2,
        "max_grad_norm": 0.05,
    }
    return FitConfig(**{**given, **more})


def shard_odd(n: int, **more: Any) -> nn.Module:
    model = make_odd()
    mesh = init_device_mesh("cpu", (n,))
    fully_shard(model.first, mesh=mesh, **more)
    fully_shard(model, mesh=mesh, **more)
    return model


def run(
    model: nn.Module, folder: Path, settings: FitConfig, *, size: int = 8, **more: Any
) -> tuple[FitResult, State]:
    """Train on seven micro-batches, so that one rank has none in the last step of a pass."""
    rows = torch.cat(make_inputs(7)).double()
    result = fit(
        model,
        list(rows.split(size)),
        output=folder / "delta.sd",
        base=folder / "base.safetensors",
        config=settings,
        loss=square_loss,
        overwrite=True,
        **more,
    )
    return result, whole(model)


def on_shards(
    rank: int, n: int, folder: Path, settings: FitConfig, more: dict[str, Any]
) -> tuple[FitResult, State]:
    return run(shard_odd(n), folder, settings, **more)


def offloaded(rank: int, folder: Path) -> tuple[FitResult, State]:
    policy = CPUOffloadPolicy(pin_memory=False)
    model = shard_odd(2, offload_policy=policy)
    return run(model, folder, config(eval_every=4, patience=9), evaluate=lambda model: 0.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(make_odd().state_dict(), tmp_path / "base.safetensors")
    return tmp_path


def close(found: State, expected: State) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-14)


def test_fit_on_shards_is_fit_in_one_process_with_the_same_micro_batches(
    pool: RankPool, folder: Path
) -> None:
    evaluate: Any = {"evaluate": mean_output}
    (ours, first), (theirs, second) = pool.results(on_shards, 2, folder, config(), evaluate)
    sparsedelta.apply(folder / "base.safetensors", folder / "delta.sd", folder / "out.safetensors")
    rebuilt = load_file(folder / "out.safetensors")
    alone, expected = run(make_odd(), folder, config(accumulation=2), **evaluate)
    close(first, expected)
    for name in first:
        assert same_bits(first[name], second[name])
        assert same_bits(first[name], rebuilt[name])
    assert ours.n_steps == theirs.n_steps == alone.n_steps == 8
    assert ours.losses == theirs.losses == pytest.approx(alone.losses, rel=1e-6)
    assert ours.evaluations[-1].first == pytest.approx(alone.evaluations[-1].first, rel=1e-6)
    assert ours.nnz == theirs.nnz == alone.nnz > 0
    assert ours.n_trained == alone.n_trained


def mean_output(model: nn.Module) -> float:
    return float(model(make_inputs(1)[0].double()).mean())


def test_gradients_choose_as_in_one_process_with_micro_batches_of_both_ranks(
    pool: RankPool, folder: Path
) -> None:
    settings = config(selection="gradient", selection_batches=4)
    ranks = pool.results(on_shards, 2, folder, settings, {})
    settings = config(selection="gradient", selection_batches=2)
    _, expected = run(make_odd(), folder, settings, size=16)
    # The last micro-batch of one process is as large as that of one rank, so its mean is that of the step.
    for _, found in ranks:
        close(found, expected)


def test_offloaded_shards_train_as_others(pool: RankPool, folder: Path) -> None:
    plain = pool.results(on_shards, 2, folder, config(), {})
    for (result, found), (_, expected) in zip(pool.results(offloaded, folder), plain, strict=True):
        assert all(same_bits(found[name], expected[name]) for name in expected)
        # The weights of the best evaluation, after step 4, are not kept for a sharded model.
        assert ([e.step for e in result.evaluations], result.kept_step) == ([4, 8], 8)


def stopped(rank: int, n: int, folder: Path, settings: FitConfig) -> None:
    def on_step(report: Any) -> None:
        if report.step == 3:
            raise StopHereError

    run(shard_odd(n), folder, settings, run_dir=folder / "run", on_step=on_step)


def test_a_run_on_shards_resumes_bit_for_bit_and_on_other_numbers_of_ranks(
    pool: RankPool, pool_of_four: RankPool, folder: Path
) -> None:
    settings = config(accumulation=2, save_every=2)
    expected = pool.results(on_shards, 2, folder, settings, {"run_dir": folder / "other"})
    for error in pool.run(stopped, 2, folder, settings):
        assert isinstance(error, StopHereError)
    assert [path.name for path in (folder / "run").iterdir()] == ["step-00000002"]
    more = {"run_dir": folder / "run", "resume": True}
    refused = pool.run(on_shards, 2, folder, config(accumulation=1, save_every=2), more)
    assert "has accumulation 4, this one 2" in str(refused[0])
    settings_of_four = config(accumulation=1, save_every=100)
    on_four = pool_of_four.results(on_shards, 4, folder, settings_of_four, more)
    for result, found in on_four:
        assert result.n_steps == 4
        close(found, expected[0][1])


def test_a_run_on_shards_resumes_with_the_same_bits(pool: RankPool, folder: Path) -> None:
    settings = config(save_every=2)
    expected = pool.results(on_shards, 2, folder, settings, {"run_dir": folder / "other"})
    pool.run(stopped, 2, folder, settings)
    assert [path.name for path in (folder / "run").iterdir()] == ["step-00000002"]
    more = {"run_dir": folder / "run", "resume": True}
    again = pool.results(on_shards, 2, folder, settings, more)
    for (ours, found), (theirs, weights) in zip(again, expected, strict=True):
        assert ours.losses == theirs.losses
        assert all(same_bits(found[name], weights[name]) for name in weights)


def without_base(rank: int, folder: Path) -> None:
    output = folder / "delta.sd"
    fit(shard_odd(2), make_inputs(2), output=output, config=config(), loss=square_loss)


def other_weights(rank: int, folder: Path) -> None:
    model: Any = shard_odd(2)
    with torch.no_grad():
        model.last.bias.add_(1)
    run(model, folder, config())


def tensor_parallel(rank: int, folder: Path) -> None:
    model = make_odd()
    parallelize_module(model, init_device_mesh("cpu", (2,)), {"first": ColwiseParallel()})
    run(model, folder, config())


@pytest.mark.parametrize(
    ("work", "sentence"),
    [
        (without_base, "no rank can save it as the base; give base"),
        (other_weights, "'last.bias' has other values than the model before training"),
        (tensor_parallel, "use SIFT in your own loop"),
    ],
)
def test_refusals(pool: RankPool, folder: Path, work: Any, sentence: str) -> None:
    for error in pool.run(work, folder):
        assert isinstance(error, ValueError)
        assert sentence in str(error)
    assert [path.name for path in folder.iterdir()] == ["base.safetensors"]


def trainer_with_fsdp(rank: int, folder: Path, *, is_mixin: bool) -> None:
    from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

    class SiftTrainer(SiftTrainerMixin, Trainer):
        pass

    make: Any = AutoModelForSequenceClassification
    arguments: Any = {"output_dir": str(folder / "out"), "use_cpu": True, "report_to": "none"}
    version: Any = {"version": 2}
    args = TrainingArguments(fsdp="full_shard", fsdp_config=version, **arguments)
    model = make.from_pretrained(folder / "base")
    with SIFT(model, 0.1) as sift:
        if is_mixin:
            SiftTrainer(model, args, sift=sift)
        SiftCallback(sift).on_train_begin(args, None, None, optimizer=None, model=model)


@pytest.mark.parametrize("is_mixin", [True, False])
def test_trainer_refuses_fsdp(pool: RankPool, tmp_path: Path, is_mixin: bool) -> None:
    make_bert(tmp_path / "base", torch.float32)
    for error in pool.run(partial(trainer_with_fsdp, is_mixin=is_mixin), tmp_path):
        assert isinstance(error, ValueError)
        assert str(error).startswith("FSDP is not supported under a Trainer")
