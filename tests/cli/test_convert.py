"""``sparsedelta convert``: what it prints, and how it fails."""

from __future__ import annotations

import json

from cli.cli_helpers import Run, Workplace


def test_report(workplace: Workplace, run: Run) -> None:
    delta = workplace.save_delta()
    options = ["--base", str(workplace.base), "--lossy"]
    out = str(workplace.path / "v1")
    done = run("convert", str(delta), out, "--to", "slime", *options)
    assert done.exit_code == 0, done.stderr
    assert "sd to slime" in done.stdout
    assert "verified by digests of all tensors" in done.stdout
    back = run("convert", out, str(workplace.path / "back.sd"), *options, "--json")
    report = json.loads(back.stdout)
    assert (report["read_as"], report["written_as"]) == ("slime", "sd")
    assert report["verified"] == "changed tensors"
    checked = run("verify", out, "--base", str(workplace.base))
    assert "converted from slime: verified by its digests of changed tensors" in checked.stdout
    shown = run("inspect", str(workplace.path / "back.sd"))
    assert "converted" in shown.stdout
    assert "verified changed tensors" in shown.stdout


def test_failures(workplace: Workplace, run: Run) -> None:
    delta = workplace.save_delta()
    base = ["--base", str(workplace.base)]
    out = str(workplace.path / "out")
    for arguments, code, message in (
        ([str(delta), out, *base], 1, "give one of sd, checkpoint"),
        ([str(delta), out, *base, "--to", "lora"], 1, "LoRA adapter cannot be written"),
        ([str(delta), out, *base, "--to", "slime", "--set", "colour"], 2, "give KEY=VALUE"),
        (
            [str(delta), out, *base, "--to", "slime", "--set", "colour=red"],
            1,
            "no setting 'colour'",
        ),
        ([str(delta), out, "--to", "slime"], 2, "--base"),
    ):
        done = run("convert", *arguments)
        assert done.exit_code == code, done.stderr
        assert message in done.stderr
