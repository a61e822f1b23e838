"""Fixtures: two small checkpoints that differ in every way, and ways to run the command line on them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cli.cli_helpers import STRANGE, Process, Run, Workplace, command, environment
from click.testing import CliRunner, Result
from helpers import Raw, noise, write, write_file

from sparsedelta.cli import main


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    place = Workplace(tmp_path)
    layer, embed, old = noise("F32", 300, 100), noise("BF16", 40, 16), noise("F16", 5)
    bias = noise("F32", 7)
    write_file(
        place.base / "model.safetensors",
        {"layer.weight": layer, "embed.weight": embed, "head.bias": bias, "old": old},
        {"format": "pt"},
    )
    grown = Raw("BF16", (41, 16), embed.data + noise("BF16", 1, 16).data)
    write_file(
        place.target / "model.safetensors",
        {
            "layer.weight": layer.changed(0, 4, 8, 40_000, 119_996),
            "embed.weight": grown,
            "head.bias": bias,
            STRANGE: noise("F32", 2, 3),
        },
        {"format": "pt"},
    )
    for folder, text in ((place.base, "{}"), (place.target, '{"a": 1}')):
        write(folder / "config.json", text)
        write(folder / "tokenizer.json", "[]")
    return place


@pytest.fixture
def run() -> Run:
    """Run the command line in this process; a traceback fails the test."""

    def run(*arguments: str | Path) -> Result:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


@pytest.fixture
def process(workplace: Workplace) -> Process:
    """Run the command line in its own process, in the workplace."""

    def process(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(*arguments),
            cwd=workplace.path,
            env=environment(**variables),
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )

    return process
