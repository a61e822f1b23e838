"""The types of the public API as a program that uses it sees them, checked by mypy and by pyright."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Each line marked ``wrong`` must be reported, and no other.
PROGRAM = """
from pathlib import Path
from typing import assert_type

import torch

import sift_train
import sparsedelta
from sparsedelta import Delta, DeltaBank, Snapshot

delta = sparsedelta.diff("base", Path("target"), info={"step": 1})
assert_type(delta, Delta)
delta.save("delta.sd")
assert_type(delta.to_bytes(), bytes)
with sparsedelta.load("delta.sd") as loaded:
    assert_type(loaded, Delta)
sparsedelta.apply("base", "delta.sd", "out", overwrite=True)
assert_type(sparsedelta.stack("one.sd", delta), Delta)
assert_type(sparsedelta.invert(delta), Delta)
assert_type(sparsedelta.verify(delta, base="base"), sparsedelta.VerifyReport)
assert_type(sparsedelta.inspect(delta), sparsedelta.Inspection)

model = torch.nn.Linear(2, 2)
delta.apply_(model)
delta.revert_(model.state_dict())
with delta.applied(model):
    pass
with DeltaBank(model).reading() as active:
    assert_type(active, str | None)
snapshot = Snapshot(model)
assert_type(snapshot.diff(), Delta)

assert_type(sparsedelta.merge("base", "one.sd", delta, method="ties"), Delta)
assert_type(sparsedelta.convert("patch", "delta.sd", base="base"), sparsedelta.ConvertReport)
assert_type(sparsedelta.push("delta.sd", "me/tuned").commit, str | None)
assert_type(sparsedelta.pull("me/tuned", Path("out")).out, Path)
channel = sparsedelta.Channel("channel")
with sparsedelta.Publisher(channel, model) as publisher:
    publisher.publish(1, {"loss": 0.5})
follower = sparsedelta.Follower(channel, model)
with follower.reading() as version:
    assert_type(version, int | None)
try:
    delta.save("delta.sd")
except sparsedelta.SparseDeltaError as error:
    assert_type(error.code, str)
    assert_type(error.remedy, str)

result = sift_train.fit(model, [{"x": torch.zeros(2)}], output="delta.sd", base="base")
assert_type(result, sift_train.FitResult)
sift = sift_train.SIFT(model)
assert_type(sift, sift_train.SIFT)

sparsedelta.diff("base")  # wrong
sparsedelta.apply("base", "delta.sd", "out", overwrite="yes")  # wrong
report: str = sparsedelta.verify(delta)  # wrong
delta.weights  # wrong
follower.sync("latest")  # wrong
"""
WRONG = {n for n, line in enumerate(PROGRAM.splitlines(), 1) if line.endswith("# wrong")}


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM, encoding="utf-8")
    return path


def run(folder: Path, module: str, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, *options],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


def test_mypy(program: Path) -> None:
    # In this folder, with its strict settings, and so with the cache of `make lint`.
    found = run(ROOT, "mypy", "--no-color-output", str(program))
    assert {int(n) for n in re.findall(r"program\.py:(\d+): error", found)} == WRONG, found


def test_pyright(program: Path) -> None:
    (program.parent / "pyrightconfig.json").write_text('{"typeCheckingMode": "standard"}')
    options = ["--outputjson", "--pythonpath", sys.executable]
    found = json.loads(run(program.parent, "basedpyright", *options, program.name))[
        "generalDiagnostics"
    ]
    lines = {one["range"]["start"]["line"] + 1 for one in found if one["severity"] == "error"}
    assert lines == WRONG, found
