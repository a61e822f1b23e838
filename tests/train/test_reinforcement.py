"""SIFT in TRL's GRPO and DPO trainers, which publish each step to a channel."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import sift_train
import sparsedelta

trl = pytest.importorskip("trl")

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # settings that TRL gives by default
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def steps_of(channel: Path) -> list[int | None]:
    return [entry.step for entry in reversed(sparsedelta.Channel(channel).log())]


@pytest.fixture(autouse=True)
def beside_the_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))  # as when an example is the program


def are_same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_grpo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    channel, delta_path = tmp_path / "channel", tmp_path / "delta.sd"
    words = ["--channel", str(channel), "--output", str(delta_path), "--steps", "12"]
    monkeypatch.setattr(sys, "argv", ["grpo", *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / "grpo.py"), run_name="__main__")
    shown = capsys.readouterr().out
    assert ended.value.code == 0, shown
    assert "the engine has step 12, the same bits as the policy" in shown
    first, last = map(float, re.findall(r"([\d.]+) at (?:first|last)", shown))
    assert last > first
    assert steps_of(channel) == list(range(1, 13))
    policy, _ = runpy.run_path(str(EXAMPLES / "grpo.py"))["make_policy"]()
    engine, _ = runpy.run_path(str(EXAMPLES / "grpo.py"))["make_policy"]()
    sparsedelta.Follower(sparsedelta.Channel(channel), engine).sync()
    with sparsedelta.load(delta_path) as delta:
        assert 0 < delta.nnz <= 0.05 * delta.numel
        delta.apply_(policy)
    assert are_same(policy, engine)


def test_dpo(tmp_path: Path) -> None:
    from datasets import Dataset  # type: ignore[import-untyped]
    from transformers import LlamaForCausalLM
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    class SiftDPOTrainer(sift_train.SiftTrainerMixin, DPOTrainer):
        pass

    make = runpy.run_path(str(EXAMPLES / "grpo.py"))["make_policy"]
    make()[0].save_pretrained(tmp_path / "base")  # TRL loads the reference model from there
    policy, tokenizer = LlamaForCausalLM.from_pretrained(tmp_path / "base"), make()[1]
    channel, work = tmp_path / "channel", tmp_path / "work"
    rows = [{"prompt": "ab", "chosen": "aei" + c, "rejected": "xyz" + c} for c in "cdefghij"]
    config: Any = DPOConfig(
        str(work), per_device_train_batch_size=4, max_steps=4, learning_rate=1e-3, bf16=False,
        use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=1,
    )  # fmt: skip
    trainer = SiftDPOTrainer(
        policy, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        sift=sift_train.SiftConfig(sparse_rate=0.05), base=tmp_path / "base",
    )  # fmt: skip
    trainer.add_callback(sift_train.PublishCallback(channel, every=2, sift=trainer.sift))
    trainer.train()
    trainer.save_model(str(work))
    assert steps_of(channel) == [2, 4]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    engine, _ = make()
    sparsedelta.Follower(sparsedelta.Channel(channel), engine).sync()
    assert are_same(engine, policy)
    sparsedelta.apply(tmp_path / "base", work / "delta.sd", tmp_path / "tuned")
    assert are_same(LlamaForCausalLM.from_pretrained(tmp_path / "tuned"), policy)
