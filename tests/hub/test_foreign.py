"""From a file of every other form to a verified delta on the Hub, and back, by the commands of docs/interop.md."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import struct
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers import assert_same_files, of_array, write, write_file
from hub.hub_helpers import SOURCE, Person, Shell, files_of
from hub.hub_server import LoopbackHub
from interop.interop_helpers import ADDITIVE, EXACT, plain_pair
from onnx import TensorProto, helper, numpy_helper

import sparsedelta
from sparsedelta.interop.vllm import from_patches, to_patches

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


def stranger_of(hub: LoopbackHub, shell: Shell, path: Path) -> Person:
    stranger = Person(hub, path / "stranger", shell)
    stranger.folder.mkdir()
    return stranger


def test_a_lora_adapter(hub: LoopbackHub, shell: Shell, tmp_path: Path) -> None:
    """Merged, it goes to the Hub and comes back as a whole; an adapter cannot be written, which is said."""
    given = plain_pair(tmp_path)
    hub.state.add_repo("org/model", files_of(given.base))
    stranger = stranger_of(hub, shell, tmp_path)
    draw = np.random.default_rng(0)
    matrices = {"A": (2, 10), "B": (12, 2)}
    tensors = {
        f"base_model.model.proj.lora_{name}.weight": of_array("F32", draw.normal(size=shape).astype("f4"))
        for name, shape in matrices.items()
    }  # fmt: skip
    adapter = stranger.folder / "adapter"
    write_file(adapter / "adapter_model.safetensors", tensors, {"format": "pt"})
    write(
        adapter / "adapter_config.json",
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}).encode(),
    )
    convert, push, pull, back = commands("lora", {})
    convert = convert[:-2]  # nobody has the merged model
    stranger.good(*[word.replace("patch.safetensors", "adapter/") for word in convert])
    stranger.good(*push)
    stranger.good(*pull)
    sparsedelta.convert(adapter, tmp_path / "merged", base=given.base, write_as="checkpoint")
    assert_same_files(tmp_path / "merged", stranger.folder / "out")
    assert stranger.json("inspect", "org/model-tuned")["info"]["converted"]["verified"] == "none"
    refused = stranger.run(*[word.replace("trl-v2", "lora") for word in back])
    assert refused.returncode == 1
    assert "has full rank" in refused.stderr


def test_patch_objects_of_vllm(hub: LoopbackHub, shell: Shell, tmp_path: Path) -> None:
    given = plain_pair(tmp_path)
    hub.state.add_repo("org/model", files_of(given.base))
    stranger = stranger_of(hub, shell, tmp_path)
    patches = to_patches(given.delta, base=given.base)
    with from_patches(patches, base=given.base) as delta:
        delta.save(stranger.folder / "delta.sd")
    _, push, pull, _ = commands("sd", {})
    stranger.good(*push)
    stranger.good(*pull)
    assert_same_files(given.target, stranger.folder / "out")
    stranger.good("convert", "org/model-tuned", "again.sd", "--base", "org/model")
    again = to_patches(stranger.folder / "again.sd", base=given.base)
    assert [one.name for one in again] == [one.name for one in patches] == ["proj.weight"]
    for one, other in zip(patches, again, strict=True):
        assert torch.equal(one.values.view(torch.int16), other.values.view(torch.int16))
        assert one.indices is not None
        assert other.indices is not None
        assert torch.equal(one.indices, other.indices)


def save_model(path: Path, step: float) -> None:
    """Write a small model of 400 numbers in the format that the suffix names."""
    numbers = np.arange(400, dtype=np.float32)
    numbers[:3] += np.float32(step)
    match path.suffix:
        case ".pt":
            torch.save({"w": torch.from_numpy(numbers)}, path)
        case ".onnx":
            ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [400]) for n in "xy"]
            node = helper.make_node("Add", ["x", "w"], ["y"])
            weights = [numpy_helper.from_array(numbers, "w")]
            onnx.save(
                helper.make_model(helper.make_graph([node], "g", ends[:1], ends[1:], weights)), path
            )
        case _:
            info = struct.pack("<Q1sIQIQ", 1, b"w", 1, 400, 0, 0)  # name, shape, F32, offset
            header = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + info
            path.write_bytes(header + bytes(-len(header) % 32) + numbers.tobytes())


@pytest.mark.parametrize("suffix", ["gguf", "onnx", "pt"])
def test_files_that_are_not_safetensors(
    suffix: str, hub: LoopbackHub, shell: Shell, tmp_path: Path
) -> None:
    """By the commands of their section."""
    stranger = stranger_of(hub, shell, tmp_path)
    base, target = (stranger.folder / f"{name}.{suffix}" for name in ("model", "tuned"))
    save_model(base, 0)
    save_model(target, 1)
    page = (SOURCE / "docs" / "interop.md").read_text(encoding="utf-8")
    found = re.findall(r"^\$ (sparsedelta|hf) (.*gguf.*)$", page, re.MULTILINE)
    assert len(found) == 4
    for program, command in found:
        words = shlex.split(command.replace("gguf", suffix))
        if program == "hf":
            done = stranger.python("-m", "huggingface_hub.cli.hf", *words)
            assert done.returncode == 0, done.stderr
        else:
            stranger.good(*words)
    assert (stranger.folder / f"rebuilt.{suffix}").read_bytes() == target.read_bytes()
    wrong = stranger.run("convert", "down/delta.sd", f"wrong.{suffix}", "--base", target)
    assert wrong.returncode == 1
    assert not (stranger.folder / f"wrong.{suffix}").exists()
