"""The stored vectors as the tests need them: from the manifest, and as files in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from blake3 import blake3

SPEC = Path(__file__).parents[2] / "spec"
VECTORS = SPEC / "vectors"
MANIFEST: dict[str, list[dict[str, Any]]] = json.loads((VECTORS / "manifest.json").read_bytes())

Tree = dict[str, bytes | None]


def named(vectors: list[dict[str, Any]]) -> list[str]:
    """Return names for test ids."""
    return [vector["name"] for vector in vectors]


def base_of(vector: dict[str, Any], scratch: Path) -> Path:
    """Return the path of a vector's base, making it if it is given by a rule."""
    if isinstance(vector["base"], str):
        return VECTORS / vector["base"]
    zeros = vector["base"]["zeros"]
    (n_bytes,) = zeros["shape"]
    entry = {"dtype": zeros["dtype"], "shape": [n_bytes], "data_offsets": [0, n_bytes]}
    header = json.dumps({zeros["name"]: entry}).encode()
    path = scratch / "base.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(n_bytes))
    return path


def tree(root: Path) -> Tree:
    """Return a checkpoint's files by path, empty folders as None; a single file has path ''."""
    if root.is_file():
        return {"": root.read_bytes()}
    found: Tree = {}
    for path in root.rglob("*"):
        if path.is_file():
            found[path.relative_to(root).as_posix()] = path.read_bytes()
        elif not any(path.iterdir()):
            found[path.relative_to(root).as_posix()] = None
    return found


def assert_is_target(vector: dict[str, Any], out: Path) -> None:
    """Check that `out` is a vector's target, byte for byte."""
    found = tree(out)
    if isinstance(vector["target"], dict):
        content = found[""]
        assert content is not None
        assert len(content) == vector["target"]["n_bytes"]
        assert blake3(content).hexdigest() == vector["target"]["blake3"]
    else:
        wanted = tree(VECTORS / vector["target"])
        wanted |= dict.fromkeys(vector.get("target_empty_folders", []))
        assert found == wanted
