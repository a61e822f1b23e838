"""From a file of every other form to a verified delta on the Hub, and back, by the commands of docs/interop.md."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from helpers import assert_same_files
from hub.hub_helpers import SOURCE, Person, Shell, files_of
from hub.hub_server import LoopbackHub
from interop.interop_helpers import ADDITIVE, EXACT, plain_pair

import sparsedelta

SECTION = "## From a file of another project to the Hub, and back"
FORM = "--to trl-v2"


def commands(form: str, settings: dict[str, str]) -> list[list[str]]:
    """Return the commands of the section, the last with another form and settings."""
    page = (SOURCE / "docs" / "interop.md").read_text(encoding="utf-8")
    section = page.partition(SECTION)[2].partition("\n## ")[0]
    found: list[str] = re.findall(r"^\$ sparsedelta (.*)$", section, re.MULTILINE)
    assert len(found) == 4
    assert FORM in found[-1]
    wanted = " ".join([f"--to {form}", *(f"--set {k}={v}" for k, v in settings.items())])
    return [shlex.split(command.replace(FORM, wanted)) for command in found]


@pytest.mark.parametrize("case", {one[0]: one for one in [*EXACT, *ADDITIVE]}.values(), ids=str)
def test_there_and_back(
    case: tuple[str, dict[str, str]], hub: LoopbackHub, shell: Shell, tmp_path: Path
) -> None:
    form, settings = case
    given = plain_pair(tmp_path)
    hub.state.add_repo("org/model", files_of(given.base))
    stranger = Person(hub, tmp_path / "stranger", shell)
    stranger.folder.mkdir()
    shutil.copytree(given.target, stranger.folder / "tuned")
    foreign = stranger.folder / "patch.safetensors"
    sparsedelta.convert(given.delta, foreign, base=given.base, write_as=form, settings=settings)
    *to_hub, back = commands(form, settings)
    for command in to_hub:
        stranger.good(*command)
    assert_same_files(given.target, stranger.folder / "out")
    report = stranger.json("inspect", "org/model-tuned")
    assert report["info"]["converted"] == {
        **report["info"]["converted"], "form": form, "verified": "target",
    }  # fmt: skip
    foreign.rename(stranger.folder / "before")
    stranger.good(*back)
    sparsedelta.apply(given.base, foreign, tmp_path / "again")
    assert_same_files(given.target, tmp_path / "again")
