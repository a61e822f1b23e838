"""Data-parallel training by two ranks is compared with one process, and misuse is refused."""

from __future__ import annotations

import os
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_helpers import RankPool, wait_for
from torch import Tensor, nn
from torch.multiprocessing import get_context
from torch.nn.parallel import DistributedDataParallel
from train_helpers import bert_batches, make_bert, make_inputs, make_net, same_bits, square_loss
from transformers import BertForSequenceClassification

import sparsedelta
from sift_train import SIFT, export_delta

State = dict[str, Tensor]


def own_loop(
    dtype: torch.dtype,
    batches: list[list[Tensor]],
    *,
    scale: float = 1.0,
    steps: int = 4,
    clip: float = 0.5,
    **more: Any,
) -> State:
    """Train; ``batches`` are the micro-batches of each step, whose gradients are summed."""
    model = make_net().to(dtype)
    with SIFT(model, 0.2, exception=["norm"], grad_acc=len(batches[0]), **more) as sift:
        optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)
        for step in range(steps):
            for batch in batches[step]:
                (square_loss(model, batch.to(dtype)) * scale).backward()
            sift.clip_grad_norm_(clip)
            optimizer.step()
            optimizer.zero_grad()
        return {**sift.state_dict(), **model.state_dict()}


def windows(n_steps: int, n_batches: int) -> list[list[Tensor]]:
    inputs = make_inputs(n_steps * n_batches)
    return [inputs[at : at + n_batches] for at in range(0, len(inputs), n_batches)]


def rank_loop(rank: int, dtype: torch.dtype, accumulation: int, more: dict[str, Any]) -> State:
    shared = windows(4, 2 * accumulation)
    own = [window[rank::2] for window in shared]
    return own_loop(dtype, own, scale=1 / accumulation, **more)


def assert_same(left: State, right: State) -> None:
    assert left.keys() == right.keys()
    different = [name for name in left if not same_bits_or_equal(left[name], right[name])]
    assert not different


def same_bits_or_equal(left: Tensor, right: Tensor) -> bool:
    return same_bits(left, right) if left.is_floating_point() else torch.equal(left, right)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_two_ranks_train_as_one_process_bit_for_bit(pool: RankPool, dtype: torch.dtype) -> None:
    first, second = pool.results(rank_loop, dtype, 1, {})
    alone = own_loop(dtype, windows(4, 2), scale=0.5)
    assert_same(first, second)
    assert_same(first, alone)


@pytest.mark.parametrize("budget", ["tensor", "global"])
@pytest.mark.parametrize("rule", ["gradient", "fisher", "random"])
def test_accumulation_gives_the_same_choice_and_equal_weights(
    pool: RankPool, budget: str, rule: str
) -> None:
    more: dict[str, Any] = {"budget": budget, "selection": rule}
    first, second = pool.results(rank_loop, torch.float64, 2, more)
    alone = own_loop(torch.float64, windows(4, 4), scale=0.25, **more)
    assert_same(first, second)
    for name, tensor in alone.items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-12, atol=1e-14)


def test_gradients_can_be_sent_in_bf16(pool: RankPool) -> None:
    first, second = pool.results(rank_loop, torch.float32, 1, {"reduce_dtype": torch.bfloat16})
    exact = own_loop(torch.float32, windows(4, 2), scale=0.5)
    assert_same(first, second)
    assert torch.equal(first["index:first.weight"], exact["index:first.weight"])
    moved = (first["first.weight"] - exact["first.weight"]).abs().max()
    assert 0 < moved < 1e-2


def count_sent(rank: int, reduce_dtype: torch.dtype | None) -> tuple[int, list[int]]:
    """Return the trained components, and the bytes of each all-reduce of a step in the middle."""
    sent: list[int] = []
    real = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return real(tensor, *args, **kwargs)

    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    sift = SIFT(model, 0.1, reduce_dtype=reduce_dtype)
    optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)
    for _ in range(3):
        sent.clear()
        dist.all_reduce = counted
        model(torch.randn(4, 64)).square().mean().backward()
        optimizer.step()
        dist.all_reduce = real
        optimizer.zero_grad()
    sift.close()
    return sift.n_trained, sent


@pytest.mark.parametrize(("reduce_dtype", "width"), [(None, 4), (torch.bfloat16, 2)])
def test_one_all_reduce_sends_the_selected_gradients_only(
    pool: RankPool, reduce_dtype: torch.dtype | None, width: int
) -> None:
    for n_trained, sent in pool.results(count_sent, reduce_dtype):
        assert len(sent) == 1
        assert width * n_trained <= sent[0] <= 1.1 * width * n_trained


def uneven(rank: int, weights: tuple[float, float] | None) -> State:
    """Rank 0 has three examples in a step, rank 1 has one, and none in the last step."""
    model = make_net().double()
    rows = make_inputs(2)
    with SIFT(model, 0.2) as sift:
        optimizer = torch.optim.SGD(sift.parameters_in_optimizer(), lr=0.1)
        for step, n in enumerate([(3, 1), (3, 1), (3, 0)]):
            start = 0 if rank == 0 else n[0]
            own = rows[step % 2][start : start + n[rank]].double()
            if len(own):
                square_loss(model, own).backward()
            sift.sync_gradients(weight=len(own))
            optimizer.step()
            optimizer.zero_grad()
    return dict(model.state_dict())


def test_weights_make_uneven_batches_count_by_their_examples(pool: RankPool) -> None:
    first, second = pool.results(uneven, None)
    assert_same(first, second)
    model = make_net().double()
    with SIFT(model, 0.2) as sift:
        # The rule sums |g| over micro-batches, so the reference must have the same two.
        chosen = pool.results(uneven_choice)[0]
        for name, part in sift.sparse_mapping.items():
            part.choose(chosen[name])
        optimizer = torch.optim.SGD(sift.parameters_in_optimizer(), lr=0.1)
        rows = make_inputs(2)
        for step, n in enumerate([4, 4, 3]):
            square_loss(model, rows[step % 2][:n].double()).backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-12, atol=1e-14)


def uneven_choice(rank: int) -> State:
    model = make_net().double()
    rows = make_inputs(2)[0]
    with SIFT(model, 0.2) as sift:
        own = rows[:3] if rank == 0 else rows[3:4]
        square_loss(model, own.double()).backward()
        sift.sync_gradients()
        return {name: part.flat_index for name, part in sift.sparse_mapping.items()}


def bad_weight(rank: int) -> None:
    model = make_net()
    with SIFT(model, 0.2) as sift:
        square_loss(model, make_inputs(1)[0]).backward()
        sift.sync_gradients(weight=0)


def test_weights_that_are_all_zero_are_refused(pool: RankPool) -> None:
    for error in pool.run(bad_weight):
        assert isinstance(error, ValueError)
        assert "weights of 0 or more, not all 0" in str(error)


def partly_used(rank: int) -> tuple[State, bool]:
    """``last`` has a gradient on rank 1 only, ``norm`` on no rank after the first step."""
    model = make_net()
    batch = make_inputs(1)[0]
    with SIFT(model, 0.2, exception=["norm"]) as sift:
        optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)
        square_loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        part = model.last if rank else model.first
        part(batch[:, : part.in_features] if not rank else torch.ones(2, 16)).sum().backward()
        sift.sync_gradients()
        has_norm = sift.sparse_mapping["norm.weight"].master.grad is not None
        optimizer.step()
        return dict(model.state_dict()), has_norm


def test_a_gradient_that_some_ranks_lack_counts_as_zero(pool: RankPool) -> None:
    (first, norm_0), (second, norm_1) = pool.results(partly_used)
    assert_same(first, second)
    assert not norm_0
    assert not norm_1


def scaled(rank: int) -> tuple[list[float], State]:
    """The gradient of rank 1 overflows in the first and third step."""
    model = make_net()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    seen = []
    with SIFT(model, 0.2) as sift:
        optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)
        for step, batch in enumerate(make_inputs(4)):
            loss = square_loss(model, batch)
            if rank == 1 and step in (0, 2):
                loss = loss * torch.inf
            scaler.scale(loss).backward()
            sift.sync_gradients()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            seen.append(scaler.get_scale())
        return seen, dict(model.state_dict())


def test_an_overflow_on_one_rank_skips_the_step_on_all(pool: RankPool) -> None:
    (scales, first), (other, second) = pool.results(scaled)
    assert scales == other == [2.0**9, 2.0**9, 2.0**8, 2.0**8]
    assert_same(first, second)
    assert all(bool(tensor.isfinite().all()) for tensor in first.values())


def autocast(rank: int) -> State:
    model = make_net()
    with SIFT(model, 0.2) as sift:
        optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)
        for batch in make_inputs(6)[rank::2]:
            with torch.autocast("cpu", torch.bfloat16):
                loss = square_loss(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return {**sift.state_dict(), **model.state_dict()}


def test_mixed_precision_keeps_the_ranks_equal(pool: RankPool) -> None:
    first, second = pool.results(autocast)
    assert_same(first, second)
    assert not same_bits(first["first.weight"], make_net().first.weight)


def ddp_after(rank: int) -> None:
    model = make_net()
    sift = SIFT(model, 0.2)
    try:
        wrapped = DistributedDataParallel(model)
        square_loss(wrapped, make_inputs(1)[0])
    finally:
        sift.close()


def ddp_around_a_hidden_call(rank: int) -> None:
    """The forward pass of the trained model is never called, only that of its layers."""
    model = make_net()
    sift = SIFT(model, 0.2)
    try:
        wrapped = DistributedDataParallel(nn.Sequential(model.first, nn.ReLU(), model.last))
        optimizer = torch.optim.SGD(sift.parameters_in_optimizer(), lr=0.1)
        wrapped(make_inputs(1)[0]).sum().backward()
        optimizer.step()
    finally:
        sift.close()


def sharded_after(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    model = make_net()
    sift = SIFT(model, 0.2)
    try:
        fully_shard(model)
        square_loss(model, make_inputs(1)[0])
    finally:
        sift.close()


def other_weights(rank: int) -> None:
    model = make_net(seed=rank)
    with SIFT(model, 0.2) as sift:
        optimizer = torch.optim.SGD(sift.parameters_in_optimizer(), lr=0.1)
        square_loss(model, make_inputs(1)[0]).backward()
        optimizer.step()


def changed_master(rank: int) -> None:
    model = make_net()
    with SIFT(model, 0.2) as sift:
        optimizer = torch.optim.SGD(sift.parameters_in_optimizer(), lr=0.1)
        square_loss(model, make_inputs(1)[0]).backward()
        optimizer.step()
        sift.check_ranks()
        with torch.no_grad():
            sift.sparse_mapping["last.weight"].master[3] += rank * 1e-6
        sift.check_ranks()


def foreign_step(rank: int) -> None:
    model = make_net()
    with SIFT(model, 0.2) as sift:
        square_loss(model, make_inputs(1)[0]).backward()
        sift.finish_selection()
        for master in sift.parameters_in_optimizer():
            assert master.grad is not None
            master.data -= 0.1 * master.grad
        try:
            square_loss(model, make_inputs(1)[0])
        finally:
            sift.zero_grad()


@pytest.mark.parametrize(
    ("work", "sentence"),
    [
        (ddp_after, "wrapped in DistributedDataParallel"),
        (ddp_around_a_hidden_call, "wrapped in DistributedDataParallel"),
        (sharded_after, "fully_shard was called after the SIFT was built"),
        (other_weights, "'first.weight' differs between the ranks before the first step"),
        (changed_master, "the master of 'last.weight' differs between the ranks"),
        (foreign_step, r"call sift.sync_gradients\(\) before the step"),
    ],
)
def test_what_would_make_ranks_differ_is_refused(pool: RankPool, work: Any, sentence: str) -> None:
    for error in pool.run(work):
        assert isinstance(error, ValueError | RuntimeError)
        with pytest.raises((ValueError, RuntimeError), match=sentence):
            raise error


def test_processes_that_nothing_connects_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for rule in ("random", "gradient"):
        model = make_net()
        with SIFT(model, 0.2, selection=rule) as sift:
            optimizer = torch.optim.SGD(sift.parameters_in_optimizer(), lr=0.1)

            def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
                square_loss(model, make_inputs(1)[0]).backward()
                optimizer.step()

            with pytest.raises(ValueError, match="2 processes were started together"):
                step(model, optimizer)


def survivor(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo",
        f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=30),
    )
    model = make_net()
    sift = SIFT(model, 0.2)
    optimizer = torch.optim.SGD(sift.parameters_in_optimizer(), lr=0.1)
    for step in range(3):
        square_loss(model, make_inputs(1)[0]).backward()
        if step == 2 and rank == 1:
            Path(folder, "at-step-2").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            optimizer.step()
        except RuntimeError as error:
            Path(folder, "said").write_text(str(error))
            return


def test_a_killed_rank_ends_the_others_with_one_sentence(tmp_path: Path) -> None:
    context = get_context("spawn")
    processes = [context.Process(target=survivor, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    wait_for(tmp_path / "at-step-2")
    for process in processes:
        process.join(60)
    assert processes[1].exitcode == -signal.SIGKILL
    assert processes[0].exitcode == 0
    said = (tmp_path / "said").read_text()
    assert said.startswith("another rank stopped or cannot be reached")
    assert "\n" not in said


def exported_by_all(rank: int, folder: Path) -> tuple[int, State, str]:
    """All ranks call ``export_delta``, as the pages show it, and one of them ``push_to_hub``."""
    model: Any = BertForSequenceClassification.from_pretrained(folder / "base")
    model.eval()
    with SIFT(model, 0.2) as sift:
        optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)
        model(**bert_batches(1)[0]).loss.backward()
        optimizer.step()
        if rank:
            wait_for(folder / "out.sd")  # the first rank may be faster
        nnz = export_delta(model, folder / "out.sd", sift=sift, base=folder / "base")
        problem = ""
        if rank:
            with pytest.raises(ValueError, match="call push_to_hub on rank 0 only") as found:
                sift.push_to_hub("me/tuned", base=folder / "base", base_id="org/base")
            problem = str(found.value)
        return nnz, dict(model.state_dict()), problem


def test_a_delta_that_all_ranks_export_is_written_by_the_first(
    pool: RankPool, tmp_path: Path
) -> None:
    make_bert(tmp_path / "base", torch.float32)
    (nnz, trained, _), (other, _, problem) = pool.results(exported_by_all, tmp_path)
    assert nnz > 0
    assert other == 0
    assert problem
    sparsedelta.apply(tmp_path / "base", tmp_path / "out.sd", tmp_path / "out")
    rebuilt = BertForSequenceClassification.from_pretrained(tmp_path / "out").state_dict()
    assert_same(rebuilt, trained)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out", "out.sd"]
