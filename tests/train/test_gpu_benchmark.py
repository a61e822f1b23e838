"""``benchmarks/gpu.py`` runs at toy size on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--work-dir", str(folder), *options]
    return subprocess.run(
        [*command, "--results", str(folder / "gpu.jsonl")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )


def rows_in(folder: Path) -> dict[tuple[str, str], Any]:
    lines = (folder / "gpu.jsonl").read_text("utf-8").splitlines()
    return {(row["part"], row["what"]): row["value"] for row in map(json.loads, lines)}


@pytest.mark.slow
def test_a_rehearsal_runs_every_part(tmp_path: Path) -> None:
    done = run(tmp_path, "--rehearse")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_in(tmp_path)
    assert {part for part, _ in rows} == {"tests", "memory", "waits", "export", "live", "channel"}
    if not torch.cuda.is_available():
        assert {value for (part, _), value in rows.items() if part == "tests"} == {"skipped"}
    for what in ("own loop", "fit"):
        assert rows["waits", f"{what}: waits in 10 steps"] == "none"
    assert rows["export", "applied on the host"] == "equal"
    for shape in ("1b", "7b"):
        assert any(what.startswith(f"{shape}, 16 tokens: LoRA") for _, what in rows)
        assert rows["live", f"{shape}: switch between residents"] > 0
        for kind in ("small step", "random values"):
            for what in ("diff, level default", "plain scatter", "apply_"):
                assert rows["live", f"{shape}, {kind}: {what}"] > 0
    assert rows["channel", "bits of the followers"] == "equal"
    table = (tmp_path / "gpu.md").read_text("utf-8")
    assert table.count("\n## ") == 6
    assert "a rehearsal at toy size" in table
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.jsonl", "gpu.md"]


@pytest.mark.slow
def test_a_part_that_is_cut_short_keeps_what_it_found(tmp_path: Path) -> None:
    """The results of other parts from an earlier run are kept too."""
    kept = {"part": "tests", "what": "one", "value": "passed", "unit": "", "note": ""}
    (tmp_path / "gpu.jsonl").write_text(json.dumps(kept) + "\n")
    done = run(tmp_path, "--rehearse", "--parts", "memory", "--minutes", "0.01")
    assert done.returncode == 1
    rows = rows_in(tmp_path)
    assert rows["memory", "the part"] == "not finished"
    assert rows["tests", "one"] == "passed"
    assert "not finished" in (tmp_path / "gpu.md").read_text("utf-8")


@pytest.mark.slow
def test_a_run_that_is_ended_leaves_results_and_no_process(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--rehearse", "--parts", "memory"]
    places = ["--work-dir", str(tmp_path), "--results", str(tmp_path / "gpu.jsonl")]
    with subprocess.Popen(
        [*command, *places], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "planned" in line:  # first result of the part
                break
        process.terminate()
        process.stdout.read()  # returns only after the part's process has ended
    assert process.returncode == 143
    assert ("memory", "7b, 16 tokens: planned, without activations") in rows_in(tmp_path)
    assert "7b, 16 tokens: planned" in (tmp_path / "gpu.md").read_text("utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.jsonl", "gpu.md"]


def test_without_a_gpu_it_says_so_first(tmp_path: Path) -> None:
    done = run(tmp_path, CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, list(tmp_path.iterdir())) == (1, [])
    assert done.stdout == "missing for everything: a CUDA device that torch can use\n"


@pytest.mark.slow
def test_a_peak_beyond_the_plan_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """If every dense gradient is kept, the comparison on a CPU must show it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import training_memory as memory

    def train_holding(setting: Any) -> tuple[int, float]:
        model = memory.make_model(setting)
        held: list[Tensor] = []
        for name, parameter in model.named_parameters():
            hooked: Any = parameter  # the method is untyped
            if "proj" in name:
                hooked.register_post_accumulate_grad_hook(lambda p: held.append(p.grad))
        return len(held), memory.run_steps(setting, model, lambda: None)

    setting = memory.Setting(memory.SHAPES["30m"], torch.float32, "cpu", 0.05, 16, n_steps=2)
    found = memory.compare(setting)
    assert found.holds
    n_total = 8 * (4 * 512**2 + 3 * 512 * 1376 + 2 * 512) + 2 * 512 * 4000 + 512
    # More than the weights and one gradient, so the measurement counts the kept gradients.
    assert found.measured_bytes > 4 * n_total + 20 * found.report.n_trained
    monkeypatch.setattr(memory, "train_sift", train_holding)
    held = memory.compare(setting)
    assert not held.holds
    assert held.measured_bytes > 2 * held.report.weight_bytes * 0.9
