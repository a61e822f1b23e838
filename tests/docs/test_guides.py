"""The Python and the commands of docs/algebra.md and docs/training.md run, with the names that they assume."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml  # type: ignore[import-untyped]
from docs.pages import ROOT, blocks, run_page

import sift_train
import sparsedelta


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return base/, a small Llama, in the working folder."""
    monkeypatch.chdir(tmp_path)
    script = ROOT / "examples" / "two_checkpoints.py"
    subprocess.run([sys.executable, script], check=True, capture_output=True)
    return tmp_path / "base"


def load(path: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path)


def save_delta(base: Path, name: str, rows: slice, *, onto: str | None = None) -> None:
    """Write a delta that changes some rows of one matrix, and its target as a folder of the same name."""
    folder = base.parent
    model = load(folder / onto if onto else base)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[rows] += 1
    with sparsedelta.diff(folder / onto if onto else base, model) as delta:
        delta.save(folder / f"{name}.sd")
    sparsedelta.apply(folder / onto if onto else base, folder / f"{name}.sd", folder / name)


def test_algebra(base: Path) -> None:
    save_delta(base, "monday", slice(4))
    save_delta(base, "tuesday", slice(3, 9), onto="monday")
    for name, rows in (
        ("sql", slice(5)),
        ("chat", slice(4, 8)),
        ("a", slice(3)),
        ("b", slice(2, 4)),
    ):
        save_delta(base, name, rows)
    (base.parent / "delta.sd").write_bytes((base.parent / "sql.sd").read_bytes())
    names: dict[str, Any] = {
        "sparsedelta": sparsedelta,
        "model": load(base),
        "inputs": {"input_ids": torch.tensor([[1, 2, 3]])},
    }
    text = (ROOT / "docs" / "algebra.md").read_text("utf-8")
    text = text.replace("-o both.sd --method", "-o merged.sd --method")  # both.sd is the stack's
    run_page(text, base.parent, names)
    assert sparsedelta.inspect("both.sd").nnz == 9 * 256
    n_kept = int(0.005 * 768 * 256)  # of each delta, which changes 5 or 4 rows of 256
    assert n_kept <= sparsedelta.inspect("merged.sd").nnz <= 2 * n_kept < 8 * 256
    assert isinstance(names["model"], transformers.LlamaForCausalLM)


def test_training(base: Path) -> None:
    (base.parent / "org").mkdir()
    (base.parent / "org" / "model").symlink_to(base)
    rows = torch.arange(64).reshape(8, 8)
    names: dict[str, Any] = {
        "torch": torch,
        "sift_train": sift_train,
        "Trainer": transformers.Trainer,
        "batches": [{"input_ids": part, "labels": part} for part in rows.split(2)],
        "data": [{"input_ids": row, "labels": row} for row in rows],
        "accuracy": lambda model: 0.5,
        "args": transformers.TrainingArguments(
            report_to="none", max_steps=1, disable_tqdm=True, dataloader_pin_memory=False
        ),
    }
    page = blocks((ROOT / "docs" / "training.md").read_text("utf-8"))
    code = [b for b in page if b.language == "python" and b.reason is None]
    fit, loop, trainer, trainer_with_config, moving, memory = (block.code for block in code)
    exec(fit, names)
    assert Path("delta.sd").stat().st_size > 0
    names["model"] = load(base)
    exec(loop, names)
    assert Path("own.sd").stat().st_size > 0
    exec(moving, names)
    assert names["sift"].n_reselections == 1
    (settings,) = (b.code for b in page if b.language == "yaml" and "reselection" in b.code)
    assert sift_train.FitConfig(**yaml.safe_load(settings)["train"]).reselection is not None
    exec(memory, names)
    names["sift"].close()
    for block in (trainer, trainer_with_config):
        names["model"] = load(base)
        with sift_train.SIFT(names["model"], 0.01) as names["sift"]:
            if block is trainer_with_config:
                names["sift"].close()
            exec(block, names)
            names["trainer"].train()
