"""The callback and the mixin with the real ``transformers.Trainer``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from train_helpers import bert_batches, make_bert, same_bits, snapshot
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

import sparsedelta
from sift_train import SIFT, SiftCallback, SiftTrainerMixin

LAYERS = ["query", "value", "intermediate.dense.weight"]


class Rows(Dataset[dict[str, Tensor]]):
    def __init__(self, n: int) -> None:
        batches = bert_batches(n)
        self.rows = [
            {key: value[at] for key, value in batch.items()} for batch in batches for at in range(4)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        return self.rows[at]


class SiftTrainer(SiftTrainerMixin, Trainer):
    pass


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_bert(tmp_path / "base", torch.float32)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    make: Any = AutoModelForSequenceClassification
    return make.from_pretrained(folder, dtype=dtype)


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": True,
        "logging_steps": 1,
        "seed": 0,
        **more,
    }
    return TrainingArguments(**given)


def spy(seen: list[Tensor]) -> Callable[..., None]:
    def before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        masters = [p for group in optimizer.param_groups for p in group["params"]]
        seen.append(torch.cat([p.grad.flatten() for p in masters if p.grad is not None]).norm())

    return before_step


def test_at_rate_one_the_callback_trains_as_trainer_does(tmp_path: Path, base: Path) -> None:
    plain, ours = load(base), load(base)
    args = arguments(
        tmp_path / "out", max_grad_norm=0.05, gradient_accumulation_steps=2, max_steps=3
    )
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    plain_trainer = Trainer(plain, args, train_dataset=Rows(6), optimizers=(optimizer, None))
    plain_trainer.train()
    sift = SIFT(ours, 1.0, ["re:."], grad_acc=2)
    optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)
    trainer = Trainer(
        ours,
        args,
        train_dataset=Rows(6),
        optimizers=(optimizer, None),
        callbacks=[SiftCallback(sift)],
    )
    trainer.train()
    assert all(same_bits(p, q) for p, q in zip(plain.parameters(), ours.parameters(), strict=True))
    logged, expected = (
        [entry["grad_norm"] for entry in each.state.log_history if "grad_norm" in entry]
        for each in (trainer, plain_trainer)
    )
    assert len(logged) == 3
    assert logged == pytest.approx(expected, rel=1e-5)


def test_every_tensor_is_trained_at_accumulation_one(tmp_path: Path, base: Path) -> None:
    """The original SIFT code never trained the tensor whose gradient comes last."""
    model = load(base)
    before = snapshot(model)
    sift = SIFT(model, 0.1, LAYERS)
    optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)
    args = arguments(tmp_path / "out", max_steps=1)
    # Without the callback nothing is clipped, but all is trained.
    Trainer(model, args, train_dataset=Rows(2), optimizers=(optimizer, None)).train()
    for name, part in sift.sparse_mapping.items():
        changed = (before[name] != model.state_dict()[name]).flatten().nonzero().flatten()
        assert changed.tolist() == part.flat_index.tolist()


def test_the_callback_clips_and_zeroes_exactly_what_is_trained(tmp_path: Path, base: Path) -> None:
    model = load(base)
    sift = SIFT(model, 0.1, LAYERS)
    optimizer = torch.optim.SGD(sift.parameters_in_optimizer(), lr=1e-2)
    seen: list[Tensor] = []
    optimizer.register_step_pre_hook(spy(seen))
    trainer = Trainer(
        model,
        arguments(tmp_path / "out", max_grad_norm=1e-5, max_steps=4),
        train_dataset=Rows(4),
        optimizers=(optimizer, None),
        callbacks=[SiftCallback(sift)],
    )
    trainer.train()
    assert [float(norm) for norm in seen] == pytest.approx([1e-5] * 4, rel=1e-2)
    assert all(master.grad is None for master in sift.parameters_in_optimizer())


def test_the_callback_refuses_the_optimizer_that_trainer_makes(tmp_path: Path, base: Path) -> None:
    model = load(base)
    sift = SIFT(model, 0.1, LAYERS)
    args = arguments(tmp_path / "out", max_steps=1)
    trainer = Trainer(model, args, train_dataset=Rows(1), callbacks=[SiftCallback(sift)])
    with pytest.raises(ValueError, match="does not train"):
        trainer.train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mixin_saves_deltas_and_resumes_bit_for_bit(
    tmp_path: Path, base: Path, dtype: torch.dtype
) -> None:
    def make(model: nn.Module, n_steps: int) -> SiftTrainer:
        args = arguments(
            tmp_path / "out",
            max_steps=6,
            save_strategy="steps",
            save_steps=2,
            gradient_accumulation_steps=2,
            weight_decay=0.1,
            lr_scheduler_type="linear",
        )
        sift = SIFT(model, 0.1, LAYERS, "classifier", grad_acc=2)
        trainer = SiftTrainer(model, args, train_dataset=Rows(8), sift=sift)
        trainer.args.max_steps = n_steps
        return trainer

    whole, resumed = load(base, dtype), load(base, dtype)
    make(whole, 6).train()
    checkpoint = tmp_path / "out" / "checkpoint-4"
    names = {path.name for path in checkpoint.iterdir()}
    assert {"delta.sd", "sift.safetensors", "optimizer.pt", "scheduler.pt"} <= names
    assert not any(name.startswith(("model", "pytorch_model")) for name in names)
    load(base, dtype).save_pretrained(tmp_path / "typed")
    sparsedelta.apply(
        tmp_path / "typed", checkpoint.parent / "checkpoint-6" / "delta.sd", tmp_path / "o"
    )
    rebuilt = load_file(tmp_path / "o" / "model.safetensors")
    assert all(same_bits(value, rebuilt[name]) for name, value in whole.state_dict().items())
    trainer = make(resumed, 6)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 6
    for name, value in whole.state_dict().items():
        assert same_bits(value, resumed.state_dict()[name]), name


def test_the_mixin_loads_the_best(tmp_path: Path, base: Path) -> None:
    model = load(base)
    sift = SIFT(model, 0.1, LAYERS)
    states: list[dict[str, Tensor]] = []

    class Recording(SiftTrainer):
        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            states.append(snapshot(model))
            metrics = {"eval_loss": 1.0 if len(states) == 2 else 2.0}
            self.log(dict(metrics))
            return metrics

    args = arguments(
        tmp_path / "out",
        max_steps=3,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    Recording(
        model, args, train_dataset=Rows(3), eval_dataset=Rows(1), sift=sift, base=base
    ).train()
    assert all(same_bits(value, model.state_dict()[name]) for name, value in states[1].items())
    assert not all(same_bits(value, model.state_dict()[n]) for n, value in states[2].items())
    delta = tmp_path / "out" / "checkpoint-3" / "delta.sd"
    sparsedelta.apply(base, delta, tmp_path / "o")
    assert (tmp_path / "o" / "vocab.txt").exists()


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd"])
def test_the_mixin_makes_the_optimizer_of_the_arguments(
    tmp_path: Path, base: Path, optim: str
) -> None:
    model = load(base)
    before = snapshot(model)
    sift = SIFT(model, 0.1, LAYERS)
    newer = hasattr(TrainingArguments, "activation_checkpointing")
    checkpointing = "activation_checkpointing" if newer else "gradient_checkpointing"
    args = arguments(tmp_path / "out", max_steps=2, optim=optim, **{checkpointing: True})
    trainer = SiftTrainer(model, args, train_dataset=Rows(2), sift=sift)
    trainer.train()
    assert optim.removesuffix("_torch") in type(trainer.optimizer.optimizer).__name__.lower()  # type: ignore[union-attr]
    for name in sift.sparse_mapping:
        assert not same_bits(before[name], model.state_dict()[name]), name
