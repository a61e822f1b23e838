"""Training of models sharded by FSDP2 and tensor parallelism is compared with one process."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import reference_decoder
import torch
import torch.distributed as dist
import transformers
from rank_helpers import RankPool
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from train_helpers import bert_batches, make_bert, make_inputs, same_bits, square_loss

import sparsedelta
from sift_train import SIFT, export_delta, load_sharded, save_sharded
from sift_train.ranks import shard, threshold
from sift_train.selection import seeded_generator, top_k_of_all

State = dict[str, Tensor]


class Odd(nn.Module):
    """No dimension can be divided by two, and ``one`` has a single row, which one rank holds."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 13)
        self.norm = nn.LayerNorm(13)
        self.last = nn.Linear(13, 5)
        self.one = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.norm(self.first(x)))
        out: Tensor = self.one(torch.tanh(self.last(hidden)))
        return out


def make_odd() -> Odd:
    torch.manual_seed(0)
    return Odd().double()


def sharded_odd(way: str) -> nn.Module:
    model = make_odd()
    mesh = init_device_mesh("cpu", (2,))
    for layer in (model.first, model.last):
        if way == "layers":
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def whole(model: nn.Module) -> State:
    shard.reshard(model)  # a forward pass without a backward pass leaves it unsharded
    return {n: shard.whole_or_self(p.detach()).clone() for n, p in model.named_parameters()}


def chosen(sift: SIFT) -> dict[str, list[int]]:
    """Return the flat indices in the whole tensors, of this rank."""
    return {
        name: (
            part.flat_index if part.shard is None else part.shard.to_whole(part.flat_index)
        ).tolist()
        for name, part in sift.sparse_mapping.items()
    }


def train(
    model: nn.Module, batches: list[list[Tensor]], clip: float = 0.05, **more: Any
) -> tuple[State, dict[str, list[int]], list[float], int]:
    given: dict[str, Any] = {"exception": "norm", **more}
    with SIFT(model, 0.2, grad_acc=len(batches[0]), **given) as sift:
        optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)
        norms = []
        for window in batches:
            for batch in window:
                (square_loss(model, batch.double()) / len(window)).backward()
            norms.append(float(sift.clip_grad_norm_(clip)))
            optimizer.step()
            optimizer.zero_grad()
        return whole(model), chosen(sift), norms, sift.n_trained


def global_windows(n_batches: int) -> list[list[Tensor]]:
    inputs = make_inputs(4 * n_batches)
    return [inputs[at : at + n_batches] for at in range(0, len(inputs), n_batches)]


def fsdp(rank: int, way: str, n_batches: int, more: dict[str, Any]) -> Any:
    own = [[batch[4 * rank : 4 * rank + 4] for batch in w] for w in global_windows(n_batches)]
    return train(sharded_odd(way), own, **more)


@pytest.mark.parametrize("way", ["root", "layers"])
@pytest.mark.parametrize(
    ("n_batches", "more"),
    [
        (1, {}),
        (2, {"budget": "global"}),
        (1, {"selection": "random"}),
        (1, {"selection": "principal", "budget": "global"}),
        (1, {"selection": "magnitude"}),
    ],
)
def test_fsdp2_trains_as_one_process(
    pool: RankPool, way: str, n_batches: int, more: dict[str, Any]
) -> None:
    ranks = pool.results(fsdp, way, n_batches, more)
    weights, index, norms, n_trained = train(make_odd(), global_windows(n_batches), **more)
    for found, _, own_norms, own_trained in ranks:
        assert own_trained == n_trained
        assert own_norms == pytest.approx(norms, rel=1e-12)
        for name, tensor in weights.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-14)
    for name, flat in index.items():
        assert sorted(ranks[0][1][name] + ranks[1][1][name]) == flat


def keys_of_shards(rank: int, k: int) -> list[dict[str, list[int]]]:
    """Choose among scores with many ties, negative and non-finite ones, of two sharded tensors."""
    mesh = init_device_mesh("cpu", (2,))
    scores = tied_scores()
    parts = {name: Piece(tensor, mesh) for name, tensor in scores.items()}
    found = threshold.top_k_of_shards(
        {name: part.own for name, part in parts.items()},
        k,
        seeded_generator(0, "x"),
        {name: part.shard for name, part in parts.items()},
    )
    return [{name: parts[name].shard.to_whole(index).tolist() for name, index in found.items()}]


class Piece:
    def __init__(self, tensor: Tensor, mesh: Any) -> None:
        from torch.distributed.tensor import distribute_tensor

        held = distribute_tensor(tensor, mesh, [Shard(0)])
        self.shard = shard.Shard(held)
        self.own = shard.local_part(held)


def tied_scores() -> State:
    generator = torch.Generator().manual_seed(5)
    first = torch.randint(-3, 4, (7, 9), generator=generator).float() / 3
    first[0, 0], first[6, 1], first[2, 2] = torch.nan, torch.inf, -torch.inf
    first[3, 3] = -0.0
    second = torch.rand(5, 4, generator=generator) * 1e-30
    return {"a": first, "b": second}


@pytest.mark.parametrize("k", [0, 1, 17, 40, 60, 83])
def test_the_threshold_over_shards_is_that_of_the_whole(pool: RankPool, k: int) -> None:
    (first,), (second,) = pool.results(keys_of_shards, k)
    expected = top_k_of_all(tied_scores(), k, seeded_generator(0, "x"))
    for name, index in expected.items():
        assert first[name] + second[name] == index.tolist()


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 16)
        self.down = nn.Linear(16, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.down(torch.relu(self.up(x))))
        return out


def make_pair() -> Pair:
    torch.manual_seed(0)
    return Pair().double()


def tensor_parallel(rank: int) -> Any:
    model = make_pair()
    plan: Any = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
    assert isinstance(model.down.weight, DTensor)
    return train(model, global_windows(1), exception="head.bias")


def test_tensor_parallel_trains_as_one_process(pool: RankPool) -> None:
    ranks = pool.results(tensor_parallel)
    weights, index, norms, n_trained = train(make_pair(), global_windows(1), exception="head.bias")
    for found, own_index, own_norms, own_trained in ranks:
        assert own_trained == n_trained
        assert own_norms == pytest.approx(norms, rel=1e-12)
        assert own_index["head.weight"] == index["head.weight"]
        for name, tensor in weights.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-14)
    for name in ("up.weight", "down.weight"):
        assert sorted(ranks[0][1][name] + ranks[1][1][name]) == index[name]


def mixed(rank: int) -> Any:
    torch.manual_seed(0)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = Odd()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)), mp_policy=policy)
    before = whole(model)
    with SIFT(model, 0.2) as sift:
        optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)
        for batch in make_inputs(6)[rank::2]:
            model(batch).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            trained = float(model(make_inputs(1)[0]).float().square().mean())
        with sift.reverted(), torch.no_grad():
            original = float(model(make_inputs(1)[0]).float().square().mean())
            reverted = whole(model)
        with torch.no_grad():
            again = float(model(make_inputs(1)[0]).float().square().mean())
        dtypes = {str(part.master.dtype) for part in sift.sparse_mapping.values()}
    return before, reverted, whole(model), [trained, original, again], dtypes


def test_mixed_precision_and_reverting_see_the_weights_of_the_shards(pool: RankPool) -> None:
    (before, reverted, after, losses, dtypes), other = pool.results(mixed)
    assert dtypes == {"torch.float32"}
    assert all(torch.equal(before[name], reverted[name]) for name in before)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(after[name], other[2][name]) for name in after)
    trained, original, again = losses
    assert trained == again < original


def part_of_the_ranks(rank: int) -> None:
    """Each rank has a mesh of its own, so the shards are not those of a common model."""
    model = make_odd()
    group = [dist.new_group([0]), dist.new_group([1])][rank]
    from torch.distributed.device_mesh import DeviceMesh

    fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
    with SIFT(model, 0.2) as sift:
        optimizer = torch.optim.SGD(sift.parameters_in_optimizer(), lr=0.1)
        square_loss(model, make_inputs(1)[0].double()).backward()
        optimizer.step()


def test_a_mesh_of_some_ranks_is_refused(pool: RankPool) -> None:
    for error in pool.run(part_of_the_ranks):
        assert isinstance(error, ValueError)
        assert "is sharded over 1 of 2 ranks" in str(error)


def saved_run(rank: int, folder: Path) -> Any:
    """Train three steps, save, train two more; return the weights after three and five steps."""
    model = sharded_odd("layers")
    with SIFT(model, 0.2, exception=["norm"]) as sift:
        optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)
        steps(sift, optimizer, [batch[4 * rank : 4 * rank + 4] for batch in make_inputs(5)[:3]])
        save_sharded(sift, folder, optimizer)
        three = whole(model)
        steps(sift, optimizer, [batch[4 * rank : 4 * rank + 4] for batch in make_inputs(5)[3:]])
        return three, whole(model), chosen(sift)


def steps(sift: SIFT, optimizer: torch.optim.Optimizer, batches: list[Tensor]) -> None:
    for batch in batches:
        square_loss(sift.model, batch.double()).backward()
        sift.clip_grad_norm_(0.05)
        optimizer.step()
        optimizer.zero_grad()


def resumed_run(rank: int, folder: Path, n_ranks: int) -> Any:
    model = make_odd() if n_ranks == 1 else sharded_odd("root")
    with SIFT(model, 0.2, exception=["norm"]) as sift:
        optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)
        load_sharded(sift, folder, optimizer)
        three, index = whole(model), chosen(sift)
        n = 8 // n_ranks
        steps(sift, optimizer, [batch[n * rank : n * rank + n] for batch in make_inputs(5)[3:]])
        return three, whole(model), index, sift.n_trained


@pytest.fixture(scope="module")
def pool_of_four() -> Iterator[RankPool]:
    made = RankPool(4)
    yield made
    made.close()


def resumed_on_four(rank: int, folder: Path) -> Any:
    model = make_odd()
    fully_shard(model, mesh=init_device_mesh("cpu", (4,)))
    with SIFT(model, 0.2, exception=["norm"]) as sift:
        optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)
        load_sharded(sift, folder, optimizer)
        three, index = whole(model), chosen(sift)
        steps(sift, optimizer, [batch[2 * rank : 2 * rank + 2] for batch in make_inputs(5)[3:]])
        return three, whole(model), index, sift.n_trained


def test_a_sharded_run_resumes_with_any_number_of_ranks(
    pool: RankPool, pool_of_four: RankPool, tmp_path: Path
) -> None:
    folder = tmp_path / "state"
    (three, five, index), (_, _, other) = pool.results(saved_run, folder)
    index = {name: sorted(index[name] + other[name]) for name in index}
    resumed = {
        1: [resumed_run(0, folder, 1)],
        2: pool.results(resumed_run, folder, 2),
        4: pool_of_four.results(resumed_on_four, folder),
    }
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    for n_ranks, results in resumed.items():
        for three_again, five_again, _, n_trained in results:
            assert n_trained == sum(map(len, index.values()))
            assert all(same_bits(three[name], three_again[name]) for name in three)
            for name, tensor in five.items():
                if n_ranks == 2:
                    assert same_bits(tensor, five_again[name])
                torch.testing.assert_close(five_again[name], tensor, rtol=1e-12, atol=1e-14)
        found = {name: sorted(at for r in results for at in r[2][name]) for name in index}
        assert found == index


def wrong_state(rank: int, folder: Path) -> None:
    model = sharded_odd("root")
    with SIFT(model, 0.2, "first") as sift:
        load_sharded(sift, folder)


def test_a_state_of_other_parameters_is_refused(pool: RankPool, tmp_path: Path) -> None:
    pool.results(saved_run, tmp_path / "state")
    for error in pool.run(wrong_state, tmp_path / "state"):
        assert isinstance(error, ValueError)
        assert "is trained either here or in" in str(error)


def hybrid(rank: int) -> Any:
    """Two replicas of a model that is sharded over two ranks."""
    model = make_odd()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
    fully_shard(model, mesh=mesh)
    own = [[batch[2 * rank : 2 * rank + 2] for batch in w] for w in global_windows(1)]
    return train(model, own)


def test_replicas_of_shards_train_as_one_process(pool_of_four: RankPool) -> None:
    ranks = pool_of_four.results(hybrid)
    weights, index, norms, n_trained = train(make_odd(), global_windows(1))
    for found, _, own_norms, own_trained in ranks:
        assert own_trained == n_trained
        assert own_norms == pytest.approx(norms, rel=1e-12)
        for name, tensor in weights.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-14)
    for name, flat in index.items():
        assert sorted(ranks[0][1][name] + ranks[1][1][name]) == flat
        assert ranks[2][1][name] + ranks[3][1][name] == ranks[0][1][name] + ranks[1][1][name]


def exported(rank: int, folder: Path, dtype: torch.dtype, *, change_base: bool) -> Any:
    make: Any = transformers.AutoModelForSequenceClassification
    model = make.from_pretrained(folder / "base", dtype=dtype)
    if change_base and rank == 1:
        with torch.no_grad():
            model.classifier.weight[2, 15] += 1  # frozen, in the shard of rank 1
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    with SIFT(model, 0.1, ["query", "intermediate"], exception=["LayerNorm"]) as sift:
        optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)
        for batch in bert_batches(4)[rank::2]:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        nnz = export_delta(
            model, folder / "delta.sd", sift=sift, base=folder / "base", info={"a": 1}
        )
        return nnz, whole(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sharded_model_is_exported_as_one_delta(
    pool: RankPool, tmp_path: Path, dtype: torch.dtype
) -> None:
    make_bert(tmp_path / "base", dtype)
    (nnz, weights), (other, _) = pool.results(partial(exported, change_base=False), tmp_path, dtype)
    assert nnz == other > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "delta.sd"]
    sparsedelta.apply(tmp_path / "base", tmp_path / "delta.sd", tmp_path / "out")
    rebuilt = load_file(tmp_path / "out" / "model.safetensors")
    assert rebuilt.keys() == weights.keys()
    assert all(same_bits(rebuilt[name], weights[name]) for name in weights)
    before = load_file(tmp_path / "base" / "model.safetensors")
    assert nnz == sum(int((before[name] != rebuilt[name]).sum()) for name in before)
    delta_bytes = (tmp_path / "delta.sd").read_bytes()
    with sparsedelta.load(tmp_path / "delta.sd") as delta:
        assert delta.info["mean_change"]
        alone = sparsedelta.diff(tmp_path / "base", tmp_path / "out", info=delta.info)
    assert alone.to_bytes() == delta_bytes
    alone.close()


def bert_of(folder: Path, n_ranks: int) -> Any:
    make: Any = transformers.AutoModelForSequenceClassification
    model = make.from_pretrained(folder / "base", dtype=torch.float64)
    if n_ranks > 1:
        for layer in model.bert.encoder.layer:
            fully_shard(layer, mesh=init_device_mesh("cpu", (n_ranks,)))
        fully_shard(model, mesh=init_device_mesh("cpu", (n_ranks,)))
    return model


def exported_alike(rank: int, folder: Path, n_ranks: int, name: str) -> int:
    """Train with the same batches on all ranks, so that the mean gradient has the bits of one process."""
    model = bert_of(folder, n_ranks)
    given: dict[str, Any] = {"exception": ["LayerNorm"], "selection": "random"}
    with SIFT(model, 0.1, ["query", "intermediate", "word_embeddings"], **given) as sift:
        optimizer = torch.optim.SGD(sift.parameters_in_optimizer(), lr=0.1)
        for batch in bert_batches(3):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        more: Any = {
            "base_id": "org/model",
            "info": {"a": 1},
            "save_target": folder / f"{name}-out",
        }
        return export_delta(model, folder / f"{name}.sd", sift=sift, base=folder / "base", **more)


def test_ranks_export_the_bytes_of_one_process(
    pool: RankPool, pool_of_four: RankPool, tmp_path: Path
) -> None:
    make_bert(tmp_path / "base", torch.float64)
    model = bert_of(tmp_path, 1)
    model.config.problem_type = "single_label_classification"  # else its forward pass sets it
    model.save_pretrained(tmp_path / "base")
    nnz = exported_alike(0, tmp_path, 1, "one")
    assert pool.results(exported_alike, tmp_path, 2, "two") == [nnz] * 2
    assert pool_of_four.results(exported_alike, tmp_path, 4, "four") == [nnz] * 4
    reference_decoder.apply(tmp_path / "base", tmp_path / "four.sd", tmp_path / "reference")
    expected = (tmp_path / "one.sd").read_bytes()
    for name in ("two", "four"):
        assert (tmp_path / f"{name}.sd").read_bytes() == expected
        for out in (f"{name}-out", "reference"):
            found = (tmp_path / out / "model.safetensors").read_bytes()
            assert found == (tmp_path / "one-out" / "model.safetensors").read_bytes()


def exported_after_an_evaluation(rank: int, folder: Path) -> int:
    """FSDP2 leaves the parameters of the root whole after a forward pass alone."""
    model = sharded_odd("root")
    with SIFT(model, 0.2) as sift:
        optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)
        for batch in make_inputs(2):
            square_loss(model, batch.double()).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            model(make_inputs(1)[0].double())
        assert not any(shard.is_sharded(parameter) for parameter in model.parameters())
        base = folder / "model.safetensors"
        nnz = export_delta(model, folder / "delta.sd", sift=sift, base=base)
        held = whole(model)
        if not rank:
            save_file(held, folder / "target.safetensors", {"format": "pt"})
        return nnz


def test_shards_are_exported_after_an_evaluation(pool: RankPool, tmp_path: Path) -> None:
    save_file(make_odd().state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    first, second = pool.results(exported_after_an_evaluation, tmp_path)
    assert first == second > 0
    sparsedelta.verify(
        tmp_path / "delta.sd",
        base=tmp_path / "model.safetensors",
        target=tmp_path / "target.safetensors",
    )


def exported_in_parallel(rank: int, folder: Path) -> int:
    model = make_pair()
    plan: Any = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
    with SIFT(model, 0.2, exception="head.bias") as sift:
        optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)
        steps(sift, optimizer, make_inputs(3))
        output, base = folder / "delta.sd", folder / "model.safetensors"
        nnz = export_delta(model, output, sift=sift, base=base, save_target=folder / "out")
        held = whole(model)
        if not rank:
            save_file(held, folder / "target.safetensors", {"format": "pt"})
        return nnz


def test_tensor_parallel_ranks_export_one_delta(pool: RankPool, tmp_path: Path) -> None:
    save_file(make_pair().state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    nnz, _ = pool.results(exported_in_parallel, tmp_path)
    assert (tmp_path / "out").read_bytes() == (tmp_path / "target.safetensors").read_bytes()
    with sparsedelta.load(tmp_path / "delta.sd") as delta:
        assert delta.nnz == nnz > 0


def test_export_refuses_a_base_that_differs_from_one_rank(pool: RankPool, tmp_path: Path) -> None:
    make_bert(tmp_path / "base", torch.float32)
    errors = pool.run(partial(exported, change_base=True), tmp_path, torch.float32)
    assert "differs from the model before training in the shard of another rank" in str(errors[0])
    assert "'classifier.weight' has other values than the model before training" in str(errors[1])
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
