"""``sparsedelta inspect``: the summary, the tables of tensors and the JSON."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
from cli.cli_helpers import STRANGE, Process, Run, Workplace, command, environment
from helpers import noise, write_file
from rich.color import ColorSystem

import sparsedelta
from sparsedelta.report.summary import new_console, summary_text

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
    per_change = f"{workplace.delta.stat().st_size / 27:.2f}"
    assert facts["per"].endswith(f" bytes of positions and values, {per_change} of the whole file")


def many_layers(workplace: Workplace, n_layers: int, info: dict[str, Any]) -> None:
    """Save a delta in which a layer changes more the higher it is, except for the first."""
    kinds = [f"{kind}.weight" for kind in "abcdefgh"]
    before = {f"h.{i}.{kind}": noise("F32", 10, 10) for i in range(n_layers) for kind in kinds}
    after = {
        name: tensor.changed(*range(0, 4 * int(name.split(".")[1]), 4))
        for name, tensor in before.items()
    }
    for folder, tensors in ((workplace.base, before), (workplace.target, after)):
        write_file(folder / "model.safetensors", tensors)
    base_id = "org/model@" + "4f1e2d9a" * 5
    with sparsedelta.diff(workplace.base, workplace.target, base_id=base_id, info=info) as delta:
        delta.save(workplace.delta)


def test_one_screen_shows_where_the_model_changes(workplace: Workplace, process: Process) -> None:
    info: dict[str, Any] = {
        "losses": [[1, 2.5], [10, 0.5]],
        "evaluations": [{"step": 0, "values": {"a": 1}}, {"step": 10, "values": {"a": 2}}],
        "settings": {"lr": 0.1},
        "mean_change": {"h.1.a.weight": 0.5},
    }
    many_layers(workplace, 8, info)
    lines = process("inspect", "delta.sd", COLUMNS="80").stdout.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    facts = dict(line.split(maxsplit=1) for line in lines if line[:1].isalpha())
    assert facts["base"].startswith("org/model@4f1e2d9a4f1e…, fingerprint ")
    assert facts["loss"] == "2.5 → 0.5 in 10 steps"
    assert facts["scores"] == "a 1 → 2 (from base)"
    assert facts["a.weight"].split() == ["·▄▅▆▇▇██", "3.50", "%"]
    assert facts["and"] == "3 more kinds"


def test_bars_are_left_out_where_the_terminal_cannot_show_them(
    workplace: Workplace, process: Process
) -> None:
    many_layers(workplace, 8, {})
    result = process("inspect", "delta.sd", PYTHONIOENCODING="latin-1")
    assert (result.returncode, result.stderr) == (0, "")
    assert "a.weight" not in result.stdout


def test_layers_share_bars_in_a_narrow_terminal(workplace: Workplace, process: Process) -> None:
    many_layers(workplace, 60, {})
    for columns in (40, 80):
        lines = process("inspect", "delta.sd", COLUMNS=str(columns)).stdout.splitlines()
        assert max(map(len, lines)) <= columns
        (bars,) = [line.split()[1] for line in lines if line.startswith("a.weight")]
        assert bars[-1] == "█"
        assert len(bars) == {40: 15, 80: 30}[columns]


def test_colours_have_a_meaning(workplace: Workplace) -> None:
    console = new_console()
    console._color_system = ColorSystem.STANDARD
    text = summary_text("delta.sd", sparsedelta.inspect(workplace.save_delta()), console)
    assert "\x1b[33m1 changed\x1b[0m, \x1b[32m1 added\x1b[0m, \x1b[36m1 resized\x1b[0m" in text


def test_tensors(workplace: Workplace, run: Run) -> None:
    output = run("inspect", workplace.save_delta(), "--tensors").stdout
    assert rows(output, "layer.weight")[-1][1:5] == ["300×100", "5", "0.017", "%"]
    assert rows(output, "embed.weight")[-1][1:6] == ["40×16", "→", "41×16", "16", "2.44"]
    assert rows(output, ESCAPED)[-1][1:5] == ["2×3", "6", "100", "%"]
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
    table = next(i for i, line in enumerate(lines) if line.startswith("added: "))
    start = next(i for i, line in enumerate(lines[table:], table) if line.startswith("model."))
    end = next(i for i, line in enumerate(lines[table:], table) if line.startswith("other."))
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
