"""The commands that help: explain and doctor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli.cli_helpers import Process, Run, Workplace

import sparsedelta
from sparsedelta import errors
from sparsedelta.errors import SparseDeltaError, by_code


def subclasses(error: type[SparseDeltaError]) -> set[type[SparseDeltaError]]:
    """Return an error with all errors below it that this package defines."""
    found = {error}.union(*map(subclasses, error.__subclasses__()))
    return {one for one in found if one.__module__.startswith("sparsedelta.")}


def test_every_error_has_a_code_and_a_remedy_of_its_own() -> None:
    defined = {one for one in subclasses(SparseDeltaError) if one.__module__ == errors.__name__}
    assert set(by_code().values()) == defined
    assert len({one.remedy for one in defined}) == len(by_code()) == len(defined) > 25


def test_every_code_is_explained(run: Run) -> None:
    for code, error in by_code().items():
        text = " ".join(run("explain", code).stdout.split())
        assert text.startswith(f"{code}: ")
        assert error.remedy.replace("`", "'") in text
        assert "`" not in text
        assert f"sparsedelta.errors.{error.__name__}" in text
        assert run("explain", error.__name__).stdout == run("explain", code).stdout


def test_all_codes_are_listed(run: Run) -> None:
    lines = run("explain").stdout.splitlines()
    assert [line.split()[0] for line in lines] == [*by_code()]


def test_unknown_code(run: Run) -> None:
    result = run("explain", "no_such_code")
    assert result.exit_code == 2
    assert "base_mismatch" in result.stderr


def test_an_error_names_the_command_that_explains_it(
    workplace: Workplace, process: Process
) -> None:
    workplace.save_delta()
    result = process("apply", "target", "delta.sd", "out")
    assert result.returncode == 1
    assert result.stderr.endswith(" (sparsedelta explain already_applied)\n")
    assert result.stderr.count("\n") == 1


def test_doctor(process: Process) -> None:
    text = process("doctor", HF_TOKEN="hf_" + "x" * 30).stdout
    lines = dict(line.split(maxsplit=1) for line in text.splitlines())
    assert lines["sparsedelta"] == sparsedelta.__version__
    assert lines["location"] == str(Path(sparsedelta.__file__).parent)
    assert "hub login               environment" in text
    assert "xxxx" not in text
    found = json.loads(process("doctor", "--json", HF_TOKEN=" ").stdout)
    assert found["kernels"] == lines["kernels"]
    assert found["packages"]["numpy"] == lines["numpy"]
    assert found["hub"]["cache_free_bytes"] > 0


@pytest.mark.parametrize("missing", ["torch", "huggingface_hub"])
def test_doctor_without_a_package(process: Process, workplace: Workplace, missing: str) -> None:
    (workplace.path / f"{missing}.py").write_text("raise ImportError")
    found = json.loads(process("doctor", "--json").stdout)
    assert found["gpus" if missing == "torch" else "hub"] is None
