"""``sparsedelta apply``: the output and the errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from cli.cli_helpers import Process, Run, Workplace
from helpers import Raw, assert_same_files, noise, state, tree, write, write_file

import sparsedelta


def test_rebuilds_the_target(workplace: Workplace, process: Process) -> None:
    workplace.save_delta()
    before = state(workplace.base)
    result = process("apply", "base/", "delta.sd", "out/")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "wrote out\n")
    assert_same_files(workplace.target, workplace.out)
    assert state(workplace.base) == before
    assert {path.name for path in workplace.path.iterdir()} == {"base", "target", "delta.sd", "out"}


@pytest.mark.parametrize("words", [("-q", "apply"), ("apply", "-q")])
def test_quiet_prints_nothing(workplace: Workplace, run: Run, words: tuple[str, str]) -> None:
    result = run(*words, workplace.base, workplace.save_delta(), workplace.out)
    assert (result.exit_code, result.output) == (0, "")
    assert_same_files(workplace.target, workplace.out)


def test_applies_deltas_in_order(workplace: Workplace, run: Run) -> None:
    final = workplace.path / "final"
    write_file(final / "model.safetensors", {"layer.weight": noise("F32", 300, 100).changed(80)})
    first, second = workplace.save_delta(), workplace.path / "second.sd"
    with sparsedelta.diff(workplace.target, final) as delta:
        delta.save(second)
    result = run("apply", workplace.base, first, second, workplace.out)
    assert result.exit_code == 0
    assert_same_files(final, workplace.out)
    backwards = run("apply", workplace.base, second, first, workplace.path / "other")
    assert backwards.exit_code == 1
    assert not (workplace.path / "other").exists()


@pytest.mark.parametrize("verify", ["full", "touched", "none"])
def test_verify_levels(workplace: Workplace, run: Run, verify: str) -> None:
    result = run("apply", workplace.base, workplace.save_delta(), workplace.out, "--verify", verify)
    assert result.exit_code == 0
    assert_same_files(workplace.target, workplace.out)


def test_verify_level_reaches_the_library(workplace: Workplace, run: Run) -> None:
    delta = workplace.save_delta()
    weights = workplace.base / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100_000] ^= 1  # a value of layer.weight that the delta does not touch
    weights.write_bytes(content)
    full = run("apply", workplace.base, delta, workplace.out)
    assert full.exit_code == 1
    assert "layer.weight" in full.stderr
    assert not workplace.out.exists()
    assert run("apply", workplace.base, delta, workplace.out, "--verify", "touched").exit_code == 0


def test_exclude_leaves_out_files_that_the_base_lacks(workplace: Workplace, run: Run) -> None:
    for folder in (workplace.base, workplace.target):
        write(folder / "README.md", "as it was")
    delta = workplace.save_delta()
    (workplace.base / "README.md").unlink()
    refused = run("apply", workplace.base, delta, workplace.out)
    assert refused.exit_code == 1
    assert "has no file 'README.md'" in refused.stderr
    assert "--exclude README.md" in refused.stderr
    assert (
        run("apply", workplace.base, delta, workplace.out, "--exclude", "README.md").exit_code == 0
    )
    (workplace.target / "README.md").unlink()
    assert_same_files(workplace.target, workplace.out)


def test_wrong_base_is_one_line_and_no_output(workplace: Workplace, process: Process) -> None:
    workplace.save_delta()
    result = process("apply", "target", "delta.sd", "out")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    assert {path.name for path in workplace.path.iterdir()} == {"base", "target", "delta.sd"}


def test_replaces_an_output_only_with_overwrite(workplace: Workplace, run: Run) -> None:
    delta = workplace.save_delta()
    write(workplace.out / "model.safetensors", "mine")
    result = run("apply", workplace.base, delta, workplace.out)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: output '{workplace.out}' exists")
    assert tree(workplace.out) == {"model.safetensors": b"mine"}
    assert run("apply", workplace.base, delta, workplace.out, "--overwrite").exit_code == 0
    assert_same_files(workplace.target, workplace.out)


@pytest.mark.parametrize("out", ["base", "base/out", "."])
def test_refuses_an_output_that_would_touch_the_base(
    workplace: Workplace, process: Process, out: str
) -> None:
    workplace.save_delta()
    before = tree(workplace.path)
    result = process("apply", "base", "delta.sd", out, "--overwrite")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    assert tree(workplace.path) == before


def test_needs_a_delta(workplace: Workplace, run: Run) -> None:
    result = run("apply", workplace.base, workplace.out)
    assert result.exit_code == 2
    assert "give BASE, at least one DELTA, and OUT, in this order" in result.stderr


def test_does_not_overwrite_a_delta_or_other_folders(workplace: Workplace, run: Run) -> None:
    delta = workplace.save_delta()
    second = workplace.path / "second.sd"
    second.write_bytes(delta.read_bytes())
    write(workplace.out / "thesis.txt", "mine")
    before = tree(workplace.path)
    for out, reason in (
        (second, "is a delta, but it is given as the output; the order is base, delta, output"),
        (workplace.out, "so it is not replaced"),
    ):
        result = run("apply", workplace.base, delta, out, "--overwrite")
        assert result.exit_code == 1
        assert reason in result.stderr
    assert tree(workplace.path) == before


def test_damaged_delta(workplace: Workplace, run: Run) -> None:
    delta = workplace.save_delta()
    delta.write_bytes(delta.read_bytes()[:-1])
    result = run("apply", workplace.base, delta, workplace.out)
    assert result.exit_code == 1
    assert "ends early" in result.stderr
    assert not workplace.out.exists()
    shutil.copy(workplace.base / "model.safetensors", delta)
    assert "is a model, not a delta" in run("apply", workplace.base, delta, workplace.out).stderr


def test_base_and_delta_in_the_wrong_order(workplace: Workplace, run: Run) -> None:
    delta = workplace.save_delta()
    result = run("apply", delta, workplace.base, workplace.out)
    assert result.exit_code == 1
    assert f"'{delta}' is a delta, but it is given as the base; the order is" in result.stderr
    result = run("apply", workplace.target, workplace.base, workplace.out)
    assert result.exit_code == 1
    assert (
        f"is a folder with a model, not a delta; make its delta with `sparsedelta diff BASE {workplace.base} -o delta.sd`"
        in result.stderr
    )
    assert "if this is the base, give it before the delta or as the base (--base" in result.stderr


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_an_input_in_place_of_the_output(
    workplace: Workplace, run: Run, overwrite: tuple[str, ...]
) -> None:
    """The advice to overwrite would be wrong: it would lose an input."""
    delta = workplace.save_delta()
    before = tree(workplace.path)
    for words, reason in (
        ((workplace.base, workplace.out, delta), "the order is base, delta, output"),
        ((workplace.base, workplace.target, delta), "the order is base, delta, output"),
        ((workplace.base, delta, workplace.base), "is also an input"),
        ((workplace.base, delta, delta), "is also an input"),
        ((workplace.base, delta, workplace.base / "model.safetensors"), "one contains the other"),
    ):
        result = run("apply", *words, *overwrite)
        assert (result.exit_code, result.stdout) == (1, "")
        assert reason in result.stderr
        assert "--overwrite" not in result.stderr
        assert tree(workplace.path) == before


def test_a_file_of_the_base_in_place_of_its_folder(workplace: Workplace, run: Run) -> None:
    delta, file = workplace.save_delta(), workplace.base / "model.safetensors"
    reason = f"'{file}' is one file, but the target also needs other files of its base"
    for words in (
        ("apply", file, delta, workplace.out),
        ("verify", delta, "--base", file),
        ("invert", delta, "--base", file, "-o", workplace.path / "undo.sd"),
    ):
        result = run(*words)
        assert result.exit_code == 1
        assert reason in result.stderr
        assert f"such as '{workplace.base}'" in result.stderr


@pytest.mark.parametrize("path", ["", "-"])
def test_a_path_that_is_none(path: str, workplace: Workplace, run: Run) -> None:
    for words in (("apply", path, "d", "o"), ("apply", "b", "d", path), ("inspect", path)):
        result = run(*words)
        assert result.exit_code == 2
        assert ("the path is empty" if not path else "'-' is not supported") in result.stderr


def test_one_file_is_not_written_under_the_name_of_a_folder(
    workplace: Workplace, process: Process
) -> None:
    weights = ("base/model.safetensors", "target/model.safetensors")
    assert process("diff", *weights, "-o", "one.sd").returncode == 0
    before = tree(workplace.path)
    result = process("apply", weights[0], "one.sd", "out/")
    assert (result.returncode, result.stderr) == (
        1,
        "error: output 'out/' is written like a folder, but the output is one file; give the name of a file,"
        " such as 'out/model.safetensors'\n",
    )
    assert tree(workplace.path) == before
    assert process("apply", weights[0], "one.sd", "out").returncode == 0
    assert_same_files(workplace.target / "model.safetensors", workplace.out)


def test_paths_get_no_note(workplace: Workplace, process: Process) -> None:
    workplace.save_delta()
    shutil.copytree(workplace.base, workplace.path / "models" / "base")
    for words in (
        ("verify", "./delta.sd", "--base", "models/base"),
        ("diff", "models/base", "target", "-o", "models/d.sd"),
        ("inspect", "models/d.sd"),
    ):
        result = process(*words)
        assert (result.returncode, "local path" in result.stderr) == (0, False)


@pytest.mark.parametrize("words", [("diff", "base", "target", "-o"), ("apply", "base", "delta.sd")])
def test_a_folder_that_cannot_be_written_is_an_error_about_the_output(
    workplace: Workplace, process: Process, words: tuple[str, ...]
) -> None:
    workplace.save_delta()
    result = process(*words, "/proc/out")  # where nobody can write, root neither
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: '/proc/out': ")
    assert "partial" not in result.stderr


def test_a_merged_adapter_is_reported(tmp_path: Path, run: Run) -> None:
    base = write_file(
        tmp_path / "base" / "model.safetensors",
        {"lin.weight": Raw("F32", (4, 2), np.zeros(8, "<f4").tobytes())},
    ).parent
    adapter, out = tmp_path / "peft", tmp_path / "out"
    one = np.ones(1, "<f4").tobytes()
    write_file(
        adapter / "adapter_model.safetensors",
        {
            "base_model.model.lin.lora_A.weight": Raw("F32", (1, 2), 2 * one),
            "base_model.model.lin.lora_B.weight": Raw("F32", (4, 1), 4 * one),
        },
    )
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 3, "target_modules": ["lin"]}
    write(adapter / "adapter_config.json", json.dumps(config))
    result = run("apply", base, adapter, out)
    assert (result.exit_code, result.stderr) == (
        0,
        f"wrote {out}\n{adapter} (PEFT, LoRA adapter) was merged into the base; it holds no digests of the target,"
        " so the result is not verified\n",
    )
    assert (out / "model.safetensors").read_bytes()[-32:] == np.full(8, 3, "<f4").tobytes()
    assert run("--quiet", "apply", base, adapter, out, "--overwrite").stderr == ""
    refused = run("merge", base, adapter, "-o", tmp_path / "merged.sd")
    assert f"first, with `sparsedelta convert {adapter} delta.sd --base BASE`" in refused.stderr
