"""``fit`` and the Trainer's mixin on two ranks, and started by torchrun and accelerate."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from rank_helpers import RankPool, free_port
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from train_helpers import bert_batches, make_bert, make_inputs, make_net, same_bits, square_loss

import sparsedelta
from sift_train import SIFT, FitConfig, FitResult, SiftTrainerMixin, fit


def config(**more: Any) -> FitConfig:
    given: dict[str, Any] = {"sparse_rate": 0.2, "lr": 1e-2, "selection_batches": 3, "epochs": 2}
    return FitConfig(**{**given, **more})


def fit_net(rank: int, folder: Path, settings: FitConfig, **more: Any) -> tuple[FitResult, Any]:
    """Train on seven micro-batches, so that the last step of a pass has one."""
    model = make_net().double()
    data = [batch.double() for batch in make_inputs(7)]
    output = folder / "delta.sd"
    result = fit(
        model, data, output=output, config=settings, loss=square_loss, overwrite=True, **more
    )
    return result, dict(model.state_dict())


def differing(left: dict[str, Tensor], right: dict[str, Tensor]) -> list[str]:
    return [name for name in left if not same_bits(left[name], right[name])]


def test_fit_on_two_ranks_is_fit_with_twice_the_accumulation(
    pool: RankPool, tmp_path: Path
) -> None:
    (ours, first), (theirs, second) = pool.results(fit_net, tmp_path, config())
    alone, expected = fit_net(0, tmp_path, config(accumulation=2))
    assert not differing(first, second)
    assert not differing(first, expected)
    assert ours.n_steps == theirs.n_steps == alone.n_steps == 8
    assert ours.losses == theirs.losses
    assert ours.losses == pytest.approx(alone.losses, rel=1e-6)
    assert ours.nnz == theirs.nnz == alone.nnz > 0
    assert ours.delta_bytes == theirs.delta_bytes


def test_accumulation_and_evaluation_are_common_to_all_ranks(
    pool: RankPool, tmp_path: Path
) -> None:
    settings = config(
        accumulation=2, eval_every=1, patience=9, mixed_precision="bf16", reduce_dtype="bf16"
    )
    (ours, first), (theirs, second) = pool.results(fit_evaluated, tmp_path, settings)
    assert not differing(first, second)
    assert ours.evaluations == theirs.evaluations
    assert [e.first for e in ours.evaluations] == [0.0] * 4
    assert ours.kept_step == theirs.kept_step == 1  # the first of equal ones


def fit_evaluated(rank: int, folder: Path, settings: FitConfig) -> Any:
    return fit_net(rank, folder, settings, evaluate=lambda model: float(rank))


def fit_other_data(rank: int, folder: Path) -> None:
    model = make_net()
    data = make_inputs(4, seed=rank)
    fit(model, data, output=folder / "delta.sd", config=config(), loss=square_loss)


def test_different_data_on_the_ranks_is_refused(pool: RankPool, tmp_path: Path) -> None:
    for error in pool.run(fit_other_data, tmp_path):
        assert isinstance(error, ValueError)
        assert "the ranks read different micro-batches" in str(error)


class Noisy(nn.Module):
    """Random numbers in the forward pass, in a number that depends on the rank."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.net = make_net()
        self.rank = rank
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn(self.rank + 1)
        self.seen.append(float(noise[0]))
        out: Tensor = self.net(x) + 0.01 * noise[0]
        return out


def fit_shuffled(rank: int, folder: Path) -> tuple[list[float], dict[str, Tensor]]:
    model = Noisy(rank)
    rows: Any = torch.cat(make_inputs(2))
    data = DataLoader(rows, batch_size=4, shuffle=True)
    fit(model, data, output=folder / "d.sd", config=config(), loss=square_loss, overwrite=True)
    return model.seen, dict(model.state_dict())


def test_ranks_share_the_order_of_the_data_but_not_the_dropout(
    pool: RankPool, tmp_path: Path
) -> None:
    (seen, first), (other, second) = pool.results(fit_shuffled, tmp_path)
    assert not differing(first, second)  # fit refuses micro-batches that differ
    assert not set(seen[2:]) & set(other[2:])


def fit_interrupted(rank: int, folder: Path) -> Any:
    def on_step(report: Any) -> None:
        if report.step == 2 and rank == 1:
            os.kill(os.getpid(), signal.SIGINT)

    return fit_net(rank, folder, config(save_every=100), run_dir=folder / "run", on_step=on_step)


def resumed(rank: int, folder: Path) -> Any:
    more: Any = {"run_dir": folder / "run", "resume": True}
    return fit_net(rank, folder, config(save_every=100), **more)


def test_ctrl_c_on_one_rank_stops_all_after_the_same_step(pool: RankPool, tmp_path: Path) -> None:
    (ours, first), (theirs, second) = pool.results(fit_interrupted, tmp_path)
    assert ours.stopped == theirs.stopped == "interrupted"
    assert ours.n_steps == theirs.n_steps == 3
    assert not differing(first, second)
    (ours, first), (theirs, second) = pool.results(resumed, tmp_path)
    _, expected = fit_net(0, tmp_path, config(accumulation=2))
    assert ours.n_steps == theirs.n_steps == 8
    assert not differing(first, expected)
    assert not differing(second, expected)


def fit_without_a_folder(rank: int, folder: Path) -> Any:
    def on_step(report: Any) -> None:
        if report.step == 8 and rank == 0:
            folder.chmod(0o500)
            (folder / "delta.sd").mkdir() if os.access(folder, os.W_OK) else None

    model = make_net()
    data = make_inputs(7)
    fit(model, data, output=folder / "delta.sd", config=config(), loss=square_loss, on_step=on_step)


def test_an_error_of_rank_0_at_the_end_ends_all_ranks(pool: RankPool, tmp_path: Path) -> None:
    first, second = pool.run(fit_without_a_folder, tmp_path)
    tmp_path.chmod(0o700)
    assert isinstance(first, OSError)
    assert str(second).startswith("rank 0 has failed: ")


SCRIPT = """
import os, signal, sys
import torch
from pathlib import Path
from train_helpers import make_inputs, make_net, square_loss
from sift_train import FitConfig, fit

folder = Path(sys.argv[1])
model = make_net().double()
data = [batch.double() for batch in make_inputs(7)]

def on_step(report):
    if "kill" in sys.argv and report.step == 5 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)

fit(model, data, output=folder / "delta.sd", loss=square_loss, run_dir=folder / "run", resume=True,
    on_step=on_step,
    config=FitConfig(sparse_rate=0.2, lr=1e-2, selection_batches=3, epochs=2, save_every=2))
torch.save(model.state_dict(), folder / f"rank-{os.environ['RANK']}.pt")
"""


def launch(tmp_path: Path, launcher: list[str], *more: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    here = Path(
        __file__
    ).parent  # not all of sys.path: a module there may have the name of a standard one
    path = os.pathsep.join(map(str, (here.parents[1], here)))
    return subprocess.run(
        [sys.executable, "-m", *launcher, str(script), str(tmp_path), *more],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def torchrun() -> list[str]:
    given = ["--nproc-per-node", "2", "--master-port", str(free_port())]
    return ["torch.distributed.run", *given]


def accelerate() -> list[str]:
    # Without --multi_gpu it starts one process on a machine without a GPU.
    given = [
        "launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--main_process_port",
        str(free_port()),
    ]
    return ["accelerate.commands.accelerate_cli", *given]


@pytest.mark.parametrize("launcher", [torchrun, accelerate])
def test_launchers(tmp_path: Path, launcher: Any) -> None:
    done = launch(tmp_path, launcher())
    assert done.returncode == 0, done.stderr
    _, expected = fit_net(0, tmp_path, config(accumulation=2))
    for rank in range(2):
        assert not differing(torch.load(tmp_path / f"rank-{rank}.pt"), expected)


def test_a_run_with_a_killed_rank_ends_with_one_sentence_and_resumes(tmp_path: Path) -> None:
    stopped = launch(tmp_path, torchrun(), "kill")
    assert stopped.returncode != 0
    assert not (tmp_path / "delta.sd").exists()
    names = [path.name for path in (tmp_path / "run").iterdir()]
    assert names == ["step-00000004"]
    done = launch(tmp_path, torchrun())
    assert done.returncode == 0, done.stderr
    _, expected = fit_net(0, tmp_path, config(accumulation=2))
    for rank in range(2):
        assert not differing(torch.load(tmp_path / f"rank-{rank}.pt"), expected)


def trainer_run(rank: int, folder: Path, *, with_sift: bool, steps: int, resume: bool) -> Any:
    from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

    class SiftTrainer(SiftTrainerMixin, Trainer):
        pass

    make: Any = AutoModelForSequenceClassification
    model = make.from_pretrained(
        folder / "base", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    rows = [{k: v[at] for k, v in b.items()} for b in bert_batches(7) for at in range(4)]
    arguments: Any = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.5,
        "learning_rate": 1e-2,
        "max_steps": 5,
        "save_steps": 3,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 1,
    }
    args = TrainingArguments(**arguments)
    if not with_sift:
        trainer: Any = Trainer(model, args, train_dataset=rows)
        trainer.train()
        return dict(model.state_dict()), trainer.state.log_history
    with SIFT(model, 1.0, "re:.", grad_acc=2) as sift:
        trainer = SiftTrainer(model, args, train_dataset=rows, sift=sift, base=folder / "base")
        trainer.train(
            resume_from_checkpoint=str(folder / "out" / "checkpoint-3") if resume else None
        )
        return dict(model.state_dict()), trainer.state.log_history


def with_sift(rank: int, folder: Path, resume: bool) -> Any:
    return trainer_run(rank, folder, with_sift=True, steps=5, resume=resume)


def without_sift(rank: int, folder: Path) -> Any:
    return trainer_run(rank, folder, with_sift=False, steps=5, resume=False)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"),
    reason="the Trainer of older versions does not resume on several CPUs",
)
def test_the_mixin_trains_as_trainer_does_with_ddp_saves_and_resumes(
    pool: RankPool, tmp_path: Path
) -> None:
    make_bert(tmp_path / "base", torch.float32)
    (plain, plain_logs), _ = pool.results(without_sift, tmp_path)
    (first, logs), (second, _) = pool.results(with_sift, tmp_path, False)
    assert not differing(first, second)
    for name, tensor in plain.items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-4, atol=1e-5)
    norms = [float(log["grad_norm"]) for log in plain_logs if "grad_norm" in log]
    assert [float(log["grad_norm"]) for log in logs if "grad_norm" in log] == pytest.approx(
        norms, rel=1e-4
    )
    saved = tmp_path / "out" / "checkpoint-5"
    assert (saved / "delta.sd").exists()
    sparsedelta.apply(tmp_path / "base", saved / "delta.sd", tmp_path / "rebuilt")
    weights = load_file(tmp_path / "rebuilt" / "model.safetensors")
    assert not differing(weights, first)
    (first_again, _), (second_again, _) = pool.results(with_sift, tmp_path, True)
    assert not differing(first_again, first)
    assert not differing(second_again, first)
