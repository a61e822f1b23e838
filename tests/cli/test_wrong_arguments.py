"""What the commands say when a model is given as a delta, arguments are swapped, or a path is empty or absent."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli.cli_helpers import Run, Workplace
from helpers import noise, write_file

from sparsedelta.cli.convert import command as convert


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (b"GGUF", "a GGUF file"),
        (b"PK\x03\x04", "a file of torch.save"),
        (b"\x80\x02\x8a\nl\xfc\x9cF", "a pickle, such as torch.save wrote before release 1.6"),
    ],
)
def test_a_model_is_called_a_model(tmp_path: Path, run: Run, start: bytes, kind: str) -> None:
    path = tmp_path / "model"
    path.write_bytes(start + bytes(100))
    assert f"is a model ({kind}), not a delta; give a delta" in run("inspect", path).stderr


def test_a_safetensors_file_is_called_a_model(workplace: Workplace, run: Run) -> None:
    path = next(workplace.base.glob("*.safetensors"))
    result = run("apply", workplace.base, path, workplace.out)
    assert "is a model (a safetensors file), not a delta" in result.stderr
    assert "other forms" not in result.stderr


def test_swapped_arguments_name_the_order(workplace: Workplace, run: Run) -> None:
    result = run("apply", workplace.save_delta(), workplace.base, workplace.out)
    assert result.exit_code == 1
    assert f"'{workplace.base}' is a folder, not a delta" in result.stderr
    assert "BASE comes before DELTA" in result.stderr
    assert not workplace.out.exists()


@pytest.mark.parametrize("words", [("log",), ("prune", "--keep", "1")])
def test_an_absent_channel_is_an_error(tmp_path: Path, run: Run, words: tuple[str, ...]) -> None:
    result = run(*words, tmp_path / "nowhere")
    assert result.exit_code == 1
    assert "there is no channel at" in result.stderr
    assert not (tmp_path / "nowhere").exists()


def test_empty_paths_and_dashes_are_refused(workplace: Workplace, run: Run) -> None:
    for words in (("diff", "", "target", "-o", "x.sd"), ("inspect", "")):
        result = run(*words)
        assert (result.exit_code, "a path is empty" in result.stderr) == (2, True)
    result = run("diff", workplace.base, workplace.target, "-o", "-")
    assert (result.exit_code, "'-' is not supported" in result.stderr) == (2, True)


@pytest.mark.parametrize("option", ["read_as", "write_as"])
def test_forms_are_completed(option: str) -> None:
    param = next(one for one in convert.params if one.name == option)
    context = convert.make_context("convert", ["in", "out", "--base", "b"], resilient_parsing=True)
    names = {item.value for item in param.type.shell_complete(context, param, "")}
    assert {"sd", "checkpoint", "slime"} <= names
    assert {item.value for item in param.type.shell_complete(context, param, "sli")} == {"slime"}


def test_an_old_torch_save_is_named(tmp_path: Path, workplace: Workplace, run: Run) -> None:
    path = tmp_path / "old.pt"
    path.write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF" + bytes(100))
    result = run("diff", path, workplace.target, "-o", tmp_path / "x.sd")
    assert "an old torch.save wrote it; convert it with: python -c" in result.stderr


def test_verify_says_when_nothing_of_the_base_is_used(workplace: Workplace, run: Run) -> None:
    other = workplace.path / "other.safetensors"
    write_file(other, {"elsewhere": noise("F32", 30)})
    output = workplace.path / "x.sd"
    assert run("diff", workplace.base, other, "-o", output).exit_code == 0
    words = run("verify", output, "--base", workplace.base).stdout
    assert "base: no tensor of it is used, the delta holds the whole target" in words
    usual = run("verify", workplace.save_delta(), "--base", workplace.base).stdout
    assert "base: correct, the delta rebuilds the target from it" in usual
