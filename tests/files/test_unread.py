"""A folder or file with weights of torch.save alone: the command in the message converts them."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import noise, write_file

import sparsedelta
from sparsedelta.errors import CheckpointError
from sparsedelta.files.checkpoint import Checkpoint
from sparsedelta.files.unread import OLD_PICKLE, conversion


def refused(base: Path, target: Path) -> str:
    with pytest.raises(CheckpointError) as found:
        sparsedelta.diff(base, target)
    return str(found.value)


def run(message: str) -> None:
    """Run the command that a message gives."""
    python, *rest = shlex.split(message.partition("convert it with: ")[2])
    assert (python, rest[0]) == ("python", "-c"), message
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, *rest[:2]], check=True, env=environment)


def test_folder_of_transformers(tmp_path: Path) -> None:
    import transformers

    make_config: Any = transformers.BertConfig
    config = make_config(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    model: Any = transformers.BertForMaskedLM(config)
    model = model.bfloat16()  # its output is tied
    model.save_pretrained(tmp_path / "base")
    old = tmp_path / "it's old"
    model.config.save_pretrained(old)
    torch.save(model.state_dict(), old / "pytorch_model.bin")
    torch.save({}, old / "training_args.bin")
    message = refused(tmp_path / "base", old)
    assert f"use {shlex.quote(f'{old}-safetensors')}, with" in message
    run(message)
    with sparsedelta.diff(tmp_path / "base", tmp_path / "it's old-safetensors") as delta:
        assert delta.nnz == 0
        assert all(row.is_copied for row in delta.tensors)


@pytest.mark.parametrize("config", [None, '{"architectures": null}', "[]", "no JSON"])
def test_folder_of_something_else(tmp_path: Path, config: str | None) -> None:
    net = torch.nn.Linear(8, 8)
    torch.manual_seed(0)
    folder = tmp_path / "net"
    folder.mkdir()
    torch.save({"a": net.weight, "tied": net.weight, "turned": net.weight.T}, folder / "net.pt")
    if config is not None:
        (folder / "config.json").write_text(config)
    message = refused(folder, folder)
    assert (
        "`sparsedelta convert TARGET delta.sd --base BASE` makes a delta of such files" in message
    )
    run(message)
    with Checkpoint(folder, exclude=["*.pt"]) as checkpoint:
        assert {file.path for file in checkpoint.weight_files} == {"net.safetensors"}
        found = {tensor.name: tensor for tensor in checkpoint.tensors.values()}
        assert found.keys() == {"a", "tied", "turned"}
        buffer = bytearray(8 * 8 * 4)
        found["turned"].read_into(memoryview(buffer), 0)
        assert bytes(buffer) == net.weight.detach().T.contiguous().numpy().tobytes()


def test_file_of_torch_save(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(4.0)}, tmp_path / "net.bin")
    with pytest.raises(CheckpointError, match=r"'.*net\.bin' is not a safetensors file") as found:
        Checkpoint(tmp_path / "net.bin")
    run(str(found.value))
    with Checkpoint(tmp_path / "net.safetensors") as checkpoint:
        assert [tensor.name for tensor in checkpoint.tensors.values()] == ["w"]


def test_a_file_of_an_old_torch_save_with_more_than_weights(tmp_path: Path) -> None:
    content = {"step": 3, "model": {"w": torch.arange(4.0), "name": "x"}}
    torch.save(content, tmp_path / "net.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"an old version of torch\.save wrote it") as found:
        Checkpoint(tmp_path / "net.pt")
    run(str(found.value))
    with Checkpoint(tmp_path / "net.safetensors") as checkpoint:
        assert [tensor.name for tensor in checkpoint.tensors.values()] == ["w"]


def test_no_command_runs_what_a_config_says() -> None:
    config = b'{"architectures": ["Model as M; import os; os.system(\'x\')#"]}'
    files = {"config.json": config, "pytorch_model.bin": b""}
    text = conversion("org/x", files, lambda path: files.get(path))
    assert "os.system" not in text
    assert "from transformers" not in text


def test_other_formats_have_no_command() -> None:
    to_safetensors = "convert its weights to safetensors first"
    both = "`sparsedelta convert TARGET delta.sd --base BASE` makes a delta of such files, and rebuilds them from it; or "
    for path, expected in (("model.gguf", both + to_safetensors), ("model.h5", to_safetensors)):
        assert conversion("x", [path], lambda path: None) == expected


@pytest.mark.parametrize("files", [[], ["optimizer.pt", "training_args.bin", "README.md"]])
def test_a_folder_without_weights(tmp_path: Path, files: list[str]) -> None:
    base = write_file(tmp_path / "base" / "model.safetensors", {"w": noise("F32", 4)}).parent
    (tmp_path / "other").mkdir()
    for name in files:
        (tmp_path / "other" / name).write_bytes(b"x")
    left_out = (
        "; left out: optimizer.pt, training_args.bin (--include and include= keep files)"
        if files
        else ""
    )
    assert refused(base, tmp_path / "other") == (
        f"'{tmp_path / 'other'}' holds no .safetensors file; it holds no weights of other formats either; give"
        f" another path{left_out}"
    )


@pytest.mark.parametrize(
    ("name", "start", "said"),
    [
        (
            "m.gguf",
            b"GGUF\3\0\0\0",
            "`sparsedelta convert TARGET delta.sd --base BASE` makes a delta of such files",
        ),
        (
            "m.onnx",
            b"\x08\x08\x12\x07",
            "`sparsedelta convert TARGET delta.sd --base BASE` makes a delta of such files",
        ),
        ("m.pt", b"PK\3\4", "or convert it with: python -c"),
        ("m.pt", OLD_PICKLE, "an old version of torch.save wrote it; convert it with: python -c"),
        ("m.json", b"{}", "give the folder that it is in"),
        ("m.txt", b"text", "give a .safetensors file or a folder that holds some"),
    ],
)
def test_what_to_do_about_another_file(tmp_path: Path, name: str, start: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(start.ljust(80, b"\xff"))
    with pytest.raises(CheckpointError, match="is not a safetensors file") as found:
        sparsedelta.diff(path, path)
    assert said in str(found.value)
