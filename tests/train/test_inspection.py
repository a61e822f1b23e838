"""``sparsedelta inspect`` on the delta of a trained model of 300 tensors: one screen, and everything with ``--info``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from train_helpers import bert_batches

import sparsedelta
from sift_train import FitConfig, fit
from sift_train.bits import SLICE, mean_change
from sparsedelta.cli import main
from sparsedelta.hub.card import CardFacts, updated_card
from sparsedelta.hub.references import Reference

SCREEN = (80, 24)


@pytest.fixture(scope="module")
def delta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    folder = tmp_path_factory.mktemp("trained")
    make_config: Any = transformers.BertConfig
    config = make_config(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=20,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=3,
    )
    torch.manual_seed(0)
    model: Any = transformers.BertForSequenceClassification(config)
    model.save_pretrained(folder / "base")
    with safe_open(folder / "base" / "model.safetensors", framework="pt") as file:
        assert len(file.keys()) > 300
    settings = FitConfig(exception="classifier", lr=1e-2)
    return fit(
        folder / "base",
        bert_batches(12),
        output=folder / "d.sd",
        config=settings,
        evaluate=lambda model: {"accuracy": 0.5, "loss": 1.0},
    ).delta


def inspect(delta: Path, *options: str) -> str:
    columns, _ = SCREEN
    done = CliRunner(env={"COLUMNS": str(columns)}).invoke(main, ["inspect", str(delta), *options])
    assert done.exit_code == 0, done.output
    return done.output


def test_summary_fits_a_screen(delta: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(delta.parent)
    lines = inspect(Path(delta.name)).splitlines()
    columns, n_lines = SCREEN
    assert len(lines) <= n_lines
    assert max(map(len, lines)) <= columns
    (at,) = (n for n, line in enumerate(lines) if line.startswith("most changed"))
    bars = [line.split()[1] for line in lines[at + 1 : at + 6]]
    assert {len(bar) for bar in bars} == {20}  # one sign for each layer


def test_info_is_printed_whole_on_request(delta: Path) -> None:
    summary, info = inspect(delta), inspect(delta, "--info")
    assert info.startswith(summary)
    with sparsedelta.load(delta) as opened:
        assert json.loads(info.removeprefix(summary)) == opened.info


def test_card_gives_one_row_to_the_changes_of_all_tensors(delta: Path) -> None:
    facts = CardFacts(
        repo_id="me/tuned",
        path="delta.sd",
        base=Reference("org/model", "0" * 40, None),
        base_is_delta=False,
        base_metadata={},
        found=sparsedelta.inspect(delta),
        file_bytes=delta.stat().st_size,
        target_bytes=10**6,
        picture=None,
        endpoint="https://huggingface.co",
    )
    card = updated_card(None, facts, alone=True)
    (row,) = (line for line in card.splitlines() if "mean_change" in line)
    assert " numbers, " in row


def test_the_mean_change_is_added_in_fp64() -> None:
    before = torch.zeros(SLICE + 3)  # more than are added at a time
    after = torch.linspace(1, 3, len(before))
    expected = float(after.double().mean())
    assert mean_change(before, after) == pytest.approx(expected, rel=1e-12, abs=0)
