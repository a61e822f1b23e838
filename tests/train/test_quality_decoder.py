"""The decoder of the study of quality: its data, its pretraining, and that every method trains it."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import quality_decoder
from quality_decoder import N_BYTES, Docstrings, code_and_docstrings, make_decoder, windows
from quality_methods import Method
from quality_run import Runner

sys.path.remove(str(Path(__file__).parents[2] / "benchmarks"))

SOURCE = '''"""Says what the module is."""
import os


class Some:
    """A class.

    With a second line.
    """

    def name(self):
        """Return it."""
        return "no docstring"


async def other(): return 1
'''


def test_a_source_is_divided_into_code_and_docstrings(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "one.py").write_text(SOURCE)
    (tmp_path / "tests" / "left_out.py").write_text('"""A test."""\n')
    (tmp_path / "wrong.py").write_text("def f(:\n")
    code, docstrings = code_and_docstrings(tmp_path)
    assert sorted(docstrings.decode().replace("\n\nWith", "\nWith").split("\n\n")) == [
        "A class.\nWith a second line.",
        "Return it.",
        "Says what the module is.",
    ]
    rest = [line for line in code.decode().splitlines() if line]
    assert rest == [
        "import os",
        "class Some:",
        "    def name(self):",
        '        return "no docstring"',
        "async def other(): return 1",
    ]


def test_windows_overlap_in_the_byte_that_is_not_predicted() -> None:
    text = bytes(range(200)) * 3
    rows = windows(text)
    assert rows.shape == ((600 - 1) // N_BYTES, N_BYTES + 1)
    assert bytes(rows[:, 1:].flatten().tolist()) == text[1 : 1 + rows[:, 1:].numel()]
    assert torch.equal(rows[1:, 0], rows[:-1, -1])


@pytest.mark.skipif(sys.platform != "linux", reason="the runner reads the peak from /proc")
def test_a_decoder_is_made_once_and_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"WIDTH": 24, "N_LAYERS": 1, "N_HEADS": 2, "MLP_WIDTH": 24, "BATCH": 4, "N_DEV": 20}
    for name, value in sizes.items():
        monkeypatch.setattr(quality_decoder, name, value)
    sources = tmp_path / "sources"
    sources.mkdir()
    n_examples = 64
    (sources / "one.py").write_text(
        f'x = 1\n"""\n"""\n\ndef f():\n    """{"abc " * 24 * n_examples}"""\n' + "y = 2\n" * 200
    )
    folder = tmp_path / "decoder"
    make_decoder(folder, sources, n_steps=2)
    made = sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir())
    make_decoder(folder, sources, n_steps=2)
    assert made == sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir())
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

    task = Docstrings(folder, n_train=8 * 4 + 3, epochs=2, n_test=7)
    assert task.n_steps == 18
    assert len(task.targets) == 7
    batches = list(task.batches(0))
    assert [len(batch) for batch in batches] == 2 * [*8 * [4], 3]
    before = task.evaluate(task.model(0), "test")
    assert 0 <= before["accuracy"] < 0.5
    for method in (Method("full"), Method("sift", 2, "random"), Method("sift", 2, "snip", 2)):
        found = Runner(task).run(method, 1e-2, 0)
        assert found["test"]["loss"] < before["loss"]
        assert ("share" in found) == (method.name == "sift")
    with pytest.raises(SystemExit, match=r"examples; \d+ are needed"):
        Docstrings(folder, n_train=1000, epochs=1, n_test=7)
