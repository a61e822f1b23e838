"""``sparsedelta verify``: the report and the errors."""

from __future__ import annotations

import json
import shlex

import pytest
from cli.cli_helpers import Run, Workplace
from helpers import tree, write


def test_the_report_names_what_was_checked(workplace: Workplace, run: Run) -> None:
    delta = workplace.save_delta()
    result = run("verify", delta)
    assert (result.exit_code, result.stderr) == (0, "")
    first, *rest = result.stdout.splitlines()
    assert first.startswith(f"{delta} is valid: 27 changed values in 3 of 4 tensors, ")
    assert rest == ["base: not checked", "target: not checked"]
    both = run("verify", delta, "--base", workplace.base, "--target", workplace.target)
    assert both.exit_code == 0
    assert both.stdout.splitlines()[1:] == [
        "base: correct, the delta rebuilds the target from it",
        "target: correct, every file",
    ]


def test_json(workplace: Workplace, run: Run) -> None:
    delta = workplace.save_delta()
    before = tree(workplace.path)
    found = json.loads(run("verify", delta, "--base", workplace.base, "--json").stdout)
    payload_bytes = found.pop("payload_bytes")
    assert 0 < payload_bytes < delta.stat().st_size
    assert found == {
        "converted": None,
        "delta": str(delta),
        "n_tensors": 4,
        "n_changed": 3,
        "nnz": 27,
        "base_checked": True,
        "target_checked": False,
        "n_from_base": 3,
    }
    assert tree(workplace.path) == before


@pytest.mark.parametrize(("option", "other"), [("--base", "target"), ("--target", "base")])
def test_wrong_checkpoint(workplace: Workplace, run: Run, option: str, other: str) -> None:
    delta = workplace.save_delta()
    result = run("verify", delta, option, workplace.path / other, "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ")


def test_a_surplus_path_is_answered_with_the_options(workplace: Workplace, run: Run) -> None:
    delta = workplace.save_delta()
    for words in ((delta, workplace.base), (workplace.base, delta)):
        result = run("verify", *words)
        assert result.exit_code == 2
        assert (
            f"unexpected argument '{words[1]}': this command takes DELTA, and as options --base BASE and --target OUT"
            in result.stderr
        )
    assert "takes no argument\n" in run("doctor", "x").stderr


def test_the_target_as_the_base(workplace: Workplace, run: Run) -> None:
    result = run("verify", workplace.save_delta(), "--base", workplace.target)
    assert result.exit_code == 1
    assert "already is this delta's target, not its base; check it as the target" in result.stderr


def test_damaged_payload(workplace: Workplace, run: Run) -> None:
    delta = workplace.save_delta()
    content = bytearray(delta.read_bytes())
    content[-1] ^= 1
    delta.write_bytes(content)
    result = run("verify", delta)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "damaged" in result.stderr


@pytest.mark.parametrize("which", ["base", "target"])
def test_a_file_that_differs_can_be_left_out(workplace: Workplace, run: Run, which: str) -> None:
    for folder in (workplace.base, workplace.target):
        write(folder / "README.md", "of the base")
    delta = workplace.save_delta()
    folder = getattr(workplace, which)
    write(folder / "README.md", "changed")
    options = (f"--{which}", folder)
    assert "README.md' differs" in run("verify", delta, *options).stderr
    assert run("verify", delta, *options, "--exclude", "README.md").exit_code == 0
    (folder / "README.md").unlink()
    assert run("verify", delta, *options, "--exclude", "*.md").exit_code == 0
    assert run("verify", delta, *options).exit_code == 1


def test_a_target_with_other_files(workplace: Workplace, run: Run) -> None:
    delta = workplace.save_delta()
    target = ("--base", workplace.base, "--target", workplace.target)
    write(workplace.target / "more.txt", "x")
    expected = f"'{workplace.target}' has 'more.txt', which is not part of the delta's target"
    assert expected in run("verify", delta, *target).stderr
    assert run("verify", delta, *target, "--exclude", "more.txt").exit_code == 0
    write(workplace.target / "a.txt", "x")
    (workplace.target / "empty folder").mkdir()
    expected = "has 'a.txt' and 2 more, which are not part of the delta's target; to leave them out of the check: "
    found = run("verify", delta, *target).stderr
    assert expected in found
    options = shlex.split(found.split(expected)[1].split(" (")[0])
    assert options == ["--exclude", "*.txt", "--exclude", "empty folder"]
    assert run("verify", delta, *target, *options).exit_code == 0
    (workplace.target / "empty folder").rmdir()
    (workplace.target / "a.txt").unlink()
    (workplace.target / "more.txt").unlink()
    (workplace.target / "tokenizer.json").unlink()
    expected = f"'{workplace.target}' lacks 'tokenizer.json', which is part of the delta's target"
    assert expected in run("verify", delta, *target).stderr
