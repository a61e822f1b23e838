"""``sparsedelta inspect``: the summary, the tables of tensors and the JSON."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
from cli.cli_helpers import STRANGE, Process, Run, Workplace, command, environment
from helpers import noise, write_file

import sparsedelta

ESCAPED = r"new.\x1b[31mred[/]\u202e:warning:"


def rows(output: str, start: str) -> list[list[str]]:
    """Return the words of the lines that begin with this text."""
    return [line.split() for line in output.splitlines() if line.startswith(start)]


def test_json_equals_that_of_the_library(workplace: Workplace, process: Process) -> None:
    found = json.loads(process("inspect", workplace.save_delta(), "--json").stdout)
    assert found.pop("delta") == str(workplace.delta)
    assert found == sparsedelta.inspect(workplace.delta).as_json()
    assert found["tensors"][3]["name"] == STRANGE


def test_summary(workplace: Workplace, process: Process) -> None:
    workplace.save_delta()
    result = process("inspect", "delta.sd")
    assert (result.returncode, result.stderr) == (0, "")
    found = sparsedelta.inspect(workplace.delta)
    facts = dict(line.split(maxsplit=1) for line in result.stdout.split("\n\n")[0].splitlines())
    assert facts["delta"].startswith(f"delta.sd: {workplace.delta.stat().st_size / 1000:.2f} kB, ")
    assert facts["base"] == f"org/model@4f1e2d9, fingerprint {found.base_fingerprint[:12]}…"
    assert facts["files"] == "1 weight file, 1 carried (config.json), 1 taken from the base"
    assert facts["tensors"] == "1 changed, 1 added, 1 resized, 1 unchanged; 1 of the base not used"
    assert facts["changed"] == "27 of 30,669 elements, 0.088 %"
    whole = rows(result.stdout, "whole file")
    assert whole[0][-1] == f"{workplace.delta.stat().st_size / 27:.2f}"


def test_tensors(workplace: Workplace, run: Run) -> None:
    output = run("inspect", workplace.save_delta(), "--tensors").stdout
    assert rows(output, "layer.weight")[0][1:5] == ["300×100", "5", "0.017", "%"]
    assert rows(output, "embed.weight")[0][1:6] == ["40×16", "→", "41×16", "16", "2.44"]
    assert rows(output, ESCAPED)[0][1:5] == ["2×3", "6", "100", "%"]
    assert rows(output, "old") == []  # of the base; the target does not use it
    assert "added: 1 tensor, F32" in output
    assert "head.bias" not in output
    assert output.endswith("1 unchanged tensor not listed\n")


def test_control_characters_in_names_are_escaped(workplace: Workplace, process: Process) -> None:
    base_id = "id\x1b]0;title\x07\n"
    info: dict[str, Any] = {"\x1b[2Jkey": "\x1b[2Jvalue", "group\x9b": {"a": [1, "\x1b"]}}
    with sparsedelta.diff(workplace.base, workplace.target, base_id=base_id, info=info) as delta:
        delta.save(workplace.delta)
    for options in (["--tensors"], ["--json"]):
        output = process("inspect", "delta.sd", *options).stdout
        assert all(c.isprintable() or c == "\n" for c in output)


def test_markup_in_names_is_printed_literally(workplace: Workplace, process: Process) -> None:
    base_id = "[bold]org[/bold]/:warning:" + "x" * 200
    with sparsedelta.diff(workplace.base, workplace.target, base_id=base_id) as delta:
        delta.save(workplace.delta)
    assert rows(process("inspect", "delta.sd").stdout, "base ")[0][1] == f"{base_id},"


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_lines_fit_the_terminal(workplace: Workplace, process: Process, columns: int) -> None:
    name = "model.layers.11.attention.output." + "a_long_component" * 6 + ".weight"
    path = workplace.target / "model.safetensors"
    write_file(path, {name: noise("F32", 10, 10), "other.weight": noise("F16", 3)})
    workplace.save_delta()
    lines = process("inspect", "delta.sd", "--tensors", COLUMNS=str(columns)).stdout.splitlines()
    assert max(map(len, lines)) <= columns
    start = next(i for i, line in enumerate(lines) if line.startswith("model."))
    end = next(i for i, line in enumerate(lines) if line.startswith("other."))
    folded = [lines[start].split()[0], *(line.strip() for line in lines[start + 1 : end])]
    assert "".join(folded) == name


def test_lines_are_not_cut_without_a_terminal(workplace: Workplace, process: Process) -> None:
    name = "x" * 500
    write_file(workplace.target / "model.safetensors", {name: noise("F32", 10, 10)})
    workplace.save_delta()
    assert rows(process("inspect", "delta.sd", "--tensors").stdout, name)


def test_the_payload_is_not_read(workplace: Workplace, run: Run) -> None:
    delta = workplace.save_delta()
    whole = run("inspect", delta, "--tensors").stdout
    content = bytearray(delta.read_bytes())
    content[-1] ^= 1
    delta.write_bytes(content)
    assert run("inspect", delta, "--tensors").stdout == whole
    assert run("verify", delta).exit_code == 1


def test_terminal_encoding_without_some_characters(workplace: Workplace, process: Process) -> None:
    workplace.save_delta()
    result = process("inspect", "delta.sd", "--tensors", PYTHONIOENCODING="latin-1")
    assert (result.returncode, result.stderr) == (0, "")
    assert rows(result.stdout, "embed.weight")[0][2] == r"\u2192"


@pytest.mark.parametrize("options", [[], ["--tensors"], ["--json"]])
def test_closed_pipe(workplace: Workplace, options: list[str]) -> None:
    tensors = {f"layer.{i}.weight": noise("F32", 4, seed=i) for i in range(3000)}
    write_file(workplace.target / "model.safetensors", tensors)
    process = subprocess.Popen(
        command("inspect", workplace.save_delta(), *options),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait() == 141  # 128 + SIGPIPE
