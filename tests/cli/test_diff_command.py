"""``sparsedelta diff``: the delta it writes, the output and the errors."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from cli.cli_helpers import Process, Run, Workplace
from helpers import Raw, assert_same_files, noise, state, tree, write, write_file

import sparsedelta


def test_writes_the_delta_that_the_library_makes(workplace: Workplace, run: Run) -> None:
    before = {**state(workplace.base), **state(workplace.target)}
    output = workplace.path / "by_command.sd"
    result = run(
        "diff", workplace.base, workplace.target, "-o", output, "--base-id", "org/model@4f1e2d9"
    )
    assert (result.exit_code, result.stderr) == (0, "")
    assert output.read_bytes() == workplace.save_delta().read_bytes()
    assert {**state(workplace.base), **state(workplace.target)} == before


def test_the_report(workplace: Workplace, run: Run) -> None:
    result = run("diff", workplace.base, workplace.target, "-o", workplace.delta)
    target_bytes = sum(len(content or b"") for content in tree(workplace.target).values())
    file_bytes = workplace.delta.stat().st_size
    first, second, third = result.stdout.splitlines()
    assert first == (
        f"{workplace.delta}: {file_bytes / 1000:.2f} kB,"
        f" {100 * file_bytes / target_bytes:.3g} % of the target's {target_bytes / 1000:.0f} kB"
    )
    # 5 in layer, a row of 16 in embed, and 6 in the added tensor.
    assert second == (
        "27 of 30,669 elements changed (0.088 %), in 3 of 4 tensors, 1 tensor of the base not used"
    )
    assert third.endswith(f" {file_bytes / 27:.2f} including the rest of the file")


def test_stdout_is_only_json(workplace: Workplace, run: Run) -> None:
    result = run("diff", workplace.base, workplace.target, "-o", workplace.delta, "--json")
    found = json.loads(result.stdout)
    delta = sparsedelta.load(workplace.delta)
    fingerprint = delta.target_fingerprint
    delta.close()
    assert fingerprint is not None
    assert found["delta"] == str(workplace.delta)
    assert found["file_bytes"] == workplace.delta.stat().st_size
    assert found["target_bytes"] == sum(len(c or b"") for c in tree(workplace.target).values())
    assert found["nnz"] == 27
    assert found["states"]["added"] == found["n_unused"] == 1
    assert found["target_fingerprint"] == fingerprint.hex()


def test_values_and_exclude_reach_the_delta(workplace: Workplace, run: Run) -> None:
    arguments = ["diff", workplace.base, workplace.target, "-o", workplace.delta]
    result = run(*arguments, "--values", "target", "--exclude", "config.*", "--exclude", "tok*")
    assert result.exit_code == 0
    found = sparsedelta.inspect(workplace.delta)
    assert {*found.value_encodings} == {"target"}
    assert found.side_files == ()


def test_single_files(workplace: Workplace, run: Run) -> None:
    base, target = (p / "model.safetensors" for p in (workplace.base, workplace.target))
    assert run("diff", base, target, "-o", workplace.delta).exit_code == 0
    assert run("apply", base, workplace.delta, workplace.out).exit_code == 0
    assert_same_files(target, workplace.out)


def test_unchanged_checkpoint(workplace: Workplace, run: Run) -> None:
    result = run("diff", workplace.base, workplace.base, "-o", workplace.delta)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[1:] == ["no tensor changed"]


def test_target_smaller_than_the_delta(tmp_path: Path, run: Run) -> None:
    for name in ("base", "target"):
        write_file(tmp_path / name, {"w": noise("F32", 100, seed=name)})
    result = run("diff", tmp_path / "base", tmp_path / "target", "-o", tmp_path / "delta.sd")
    assert result.exit_code == 0
    assert (tmp_path / "delta.sd").is_file()
    assert result.stderr.startswith("warning: the delta (")
    assert "is not smaller than the target (" in result.stderr
    assert "warning" not in result.stdout


def test_target_that_changed_much(tmp_path: Path, run: Run) -> None:
    for changed, warned in ((1_000_000, True), (4_000, False)):
        base = noise("U8", 2 << 20)
        data = noise("U8", changed, seed=1).data + base.data[changed:]
        write_file(tmp_path / "base", {"w": base})
        write_file(tmp_path / "target", {"w": Raw("U8", base.shape, data * 1)})
        args = (tmp_path / "base", tmp_path / "target", "-o", tmp_path / "delta.sd", "--overwrite")
        result = run("diff", *args)
        assert ("% of the target; deltas are small" in result.stderr) == warned


def test_replaces_a_file_only_with_overwrite(
    workplace: Workplace, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(workplace.delta, "mine")
    with monkeypatch.context() as patch:
        patch.setattr(sparsedelta, "diff", None)  # the error comes before the comparison
        result = run("diff", workplace.base, workplace.target, "-o", workplace.delta)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: output '{workplace.delta}' exists")
    assert workplace.delta.read_text() == "mine"
    overwriting = run(
        "diff", workplace.base, workplace.target, "-o", workplace.delta, "--overwrite"
    )
    assert overwriting.exit_code == 0
    assert sparsedelta.inspect(workplace.delta).nnz == 27


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("out", "is a folder"),
        ("nowhere/delta.sd", "does not exist"),
        ("base/config.json", "is or lies in the input"),
        ("base", "is a folder"),
        ("target/model.safetensors", "is or lies in the input"),
        ("base/new.sd", "is or lies in the input"),
    ],
)
def test_refuses_an_unsuitable_output(
    workplace: Workplace,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    output: str,
    reason: str,
) -> None:
    write(workplace.out / "kept", "mine")
    before = tree(workplace.path)
    monkeypatch.setattr(sparsedelta, "diff", None)  # the error comes before the comparison
    path = workplace.path / output
    result = run("diff", workplace.base, workplace.target, "-o", path, "--overwrite")
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"'{path}'" in result.stderr
    assert reason in result.stderr
    assert tree(workplace.path) == before


def test_refuses_an_input_as_the_output_under_any_name(tmp_path: Path, run: Run) -> None:
    base = write_file(tmp_path / "base", {"w": noise("F32", 4)})
    (tmp_path / "alias").symlink_to(base)
    content = base.read_bytes()
    result = run("diff", base, base, "-o", tmp_path / "alias", "--overwrite")
    assert result.exit_code == 1
    assert "is or lies in the input" in result.stderr
    assert base.read_bytes() == content


def test_the_error_names_a_file_that_cannot_be_carried(workplace: Workplace, run: Run) -> None:
    write(workplace.target / "head.pt", "x")
    result = run("diff", workplace.base, workplace.target, "-o", workplace.delta)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "head.pt" in result.stderr
    assert "--exclude head.pt" in result.stderr
    assert not workplace.delta.exists()
    again = run(
        "diff", workplace.base, workplace.target, "-o", workplace.delta, "--exclude", "head.pt"
    )
    assert again.exit_code == 0


def test_base_id_that_is_not_valid_text(workplace: Workplace, process: Process) -> None:
    arguments = ["diff", "base", "target", "-o", "delta.sd", "--base-id", os.fsdecode(b"org/\xff")]
    result = process(*arguments)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    assert not workplace.delta.exists()


@pytest.mark.parametrize("command", ["diff base target", "invert delta.sd --base base"])
def test_base_id_that_is_no_commit(
    workplace: Workplace, run: Run, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    workplace.save_delta()
    monkeypatch.chdir(workplace.path)
    result = run(*command.split(), "-o", "new.sd", "--base-id", "wrong")
    assert (result.exit_code, result.stdout) == (1, "")
    expected = "error: --base-id 'wrong' is not a repository on the Hub; write org/model@<commit>\n"
    assert result.stderr == expected
    for name in ("org/model", "org/model@main", "org/model@4f1e2d9", f"org/model@{'a' * 40}"):
        result = run(*command.split(), "-o", "new.sd", "--base-id", name, "--overwrite")
        warning = f"warning: '{name}' may name other weights later; org/model@<commit> never does\n"
        assert result.stderr == (warning if len(name) < 15 else "")
        assert sparsedelta.inspect("new.sd").base_id == name


def test_unrelated_models_of_one_shape(tmp_path: Path, run: Run) -> None:
    values = np.random.default_rng(0).normal(0, 0.02, (2, 600, 1000)).astype("<f4")
    files = [
        write_file(tmp_path / str(number), {"w": Raw("F32", one.shape, one.tobytes())})
        for number, one in enumerate(values)
    ]
    result = run("diff", *files, "-o", tmp_path / "d.sd")
    assert re.fullmatch(
        r"warning: 100 % of the values differ, and the delta is 8\d\.\d % of the target: these look like two unrelated"
        r" models; is this the right base\?\n",
        result.stderr,
    )


def test_shards_beside_a_whole_model_of_the_same_name(tmp_path: Path, run: Run) -> None:
    tensor = noise("F32", 9)
    for folder in (tmp_path / "base", tmp_path / "target"):
        write_file(folder / "model-00001-of-00001.safetensors", {"w": tensor})
    for wanted in (False, True):
        result = run(
            "diff", tmp_path / "base", tmp_path / "target", "-o", tmp_path / f"{wanted}.sd"
        )
        assert (
            "warning: the target holds 'model.safetensors' and shards" in result.stderr
        ) == wanted
        write_file(tmp_path / "target" / "model.safetensors", {"w": tensor})


def test_note_about_files_left_out(workplace: Workplace, run: Run) -> None:
    write(workplace.target / ".env", "TOKEN=hf_secret")
    result = run("diff", workplace.base, workplace.target, "-o", workplace.delta)
    assert result.exit_code == 0
    assert "left out: .env (not part of a checkpoint; --include keeps them)" in result.stderr
    assert b"hf_secret" not in workplace.delta.read_bytes()
    run(
        "diff",
        workplace.base,
        workplace.target,
        "-o",
        workplace.delta,
        "--overwrite",
        "--include",
        ".env",
    )
    assert ".env" in run("inspect", workplace.delta, "--json").stdout


def test_tensors_without_counterpart(tmp_path: Path, run: Run) -> None:
    base = write_file(tmp_path / "base", {"w": noise("F32", 9), "v": noise("F32", 8)})
    cast = {"w": noise("F16", 9), "v": noise("F16", 8)}
    for tensors, cause in (
        ({"other.a": noise("F32", 7), "other.b": noise("F32", 6)}, "is this the right base?"),
        (cast, "the base has them in another dtype or shape (F32 instead of F16)"),
    ):
        target = write_file(tmp_path / "target", tensors)
        result = run("diff", base, target, "-o", tmp_path / "delta.sd", "--overwrite")
        assert "warning: 2 of 2 tensors have no counterpart in the base" in result.stderr
        assert cause in result.stderr
    folder = write(tmp_path / "adapter" / "adapter_config.json", "{}").parent
    write_file(folder / "adapter_model.safetensors", {"lora_A": noise("F32", 7)})
    result = run("diff", base, folder, "-o", tmp_path / "delta.sd", "--overwrite")
    assert "the target is a PEFT adapter" in result.stderr


@pytest.mark.parametrize(
    "names", [("_orig_mod.w", "_orig_mod.v"), ("x", "v")], ids=["a prefix", "a name"]
)
def test_renamed_tensors_have_counterparts(
    tmp_path: Path, run: Run, names: tuple[str, str]
) -> None:
    w, v = noise("F32", 9), noise("F32", 8)
    base = write_file(tmp_path / "base", {"w": w, "v": v})
    target = write_file(tmp_path / "target", dict(zip(names, (w, v), strict=True)))
    result = run("diff", base, target, "-o", tmp_path / "delta.sd", "--json")
    assert "counterpart" not in result.stderr
    found = json.loads(result.stdout)
    assert (found["nnz"], found["n_unused"]) == (0, 0)
    n_renamed = sum(name not in ("w", "v") for name in names)
    assert found["states"]["renamed"] == n_renamed
    assert ("2 of 2 tensors have another name than in the base" in result.stderr) == (
        n_renamed == 2
    )


def test_a_base_with_training_checkpoints_in_its_folder(tmp_path: Path, run: Run) -> None:
    """Files that are left out of the comparison are also ignored when the cause is determined."""
    base = write_file(tmp_path / "base" / "model.safetensors", {"w": noise("F32", 9)}).parent
    write_file(base / "checkpoint-5" / "model-00001-of-00002.safetensors", {"v": noise("F32", 9)})
    target = write_file(tmp_path / "target" / "model.safetensors", {"x": noise("F32", 8)}).parent
    result = run("diff", base, target, "-o", tmp_path / "delta.sd")
    assert result.exit_code == 0
    assert "is this the right base?" in result.stderr


def test_the_folder_above_the_base_is_warned_of(tmp_path: Path, run: Run) -> None:
    tensors = {"w": noise("F32", 9), "v": noise("F32", 8)}
    base = write_file(tmp_path / "above" / "base" / "model.safetensors", tensors).parent
    target = write_file(tmp_path / "target" / "model.safetensors", tensors).parent
    for given, said in ((base.parent, True), (base, False)):
        result = run("diff", given, target, "-o", tmp_path / "delta.sd", "--overwrite")
        assert ("all tensors of the base are in its folder 'base/'" in result.stderr) == said
