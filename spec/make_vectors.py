"""Write the test vectors of the format: `python make_vectors.py [--unreleased | --all FOLDER]`.

An existing vector counts as released. If its bytes would change, the script stops before it writes
anything. `--unreleased` overwrites such vectors, and removes files that are no longer vectors. `--all`
writes all vectors to FOLDER, including invalid ones that are not stored because they are variations of
stored ones.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from blake3 import blake3
from vector_source import Valid, invalid_vectors, is_stored, sample_base, valid_vectors
from vector_source.writer import Checkpoint

VECTORS = Path(__file__).parent / "vectors"


def stored(prefix: str, checkpoint: Checkpoint) -> tuple[str, dict[str, bytes]]:
    """Return the path of a checkpoint in the vectors' folder, and the content of its files by path."""
    if checkpoint.kind == "file":
        path = prefix + ".safetensors"
        return path, {path: checkpoint.weight_files[0].content()}
    return prefix, {f"{prefix}/{path}": data for path, data in checkpoint.files().items()}


def valid_files(vector: Valid) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return the entry in `manifest.json` and the files of a valid vector."""
    folder = f"valid/{vector.name}"
    files = {f"{folder}/delta.sd": vector.delta}
    member: dict[str, Any] = {"name": vector.name, "shows": vector.shows}
    member["delta"] = f"{folder}/delta.sd"
    if vector.zeros:
        (name,) = vector.base.tensors()
        shape = list(vector.zeros.shape)
        member["base"] = {"zeros": {"name": name, "dtype": vector.zeros.dtype, "shape": shape}}
        content = vector.target.weight_files[0].content()
        member["target"] = {"blake3": blake3(content).hexdigest(), "n_bytes": len(content)}
        return member, files
    for role, checkpoint in (("base", vector.base), ("target", vector.target)):
        member[role], more = stored(f"{folder}/{role}", checkpoint)
        files |= more
    if vector.target.empty_folders:
        member["target_empty_folders"] = vector.target.empty_folders
    return member, files


def all_files(everything: bool = False) -> dict[str, bytes]:
    """Return the content of every file of the vectors by path, including `manifest.json`.

    Args:
        everything: whether to include the invalid vectors that are not stored.
    """
    files: dict[str, bytes] = {}
    manifest: dict[str, Any] = {"valid": [], "invalid": []}
    for vector in valid_vectors():
        member, more = valid_files(vector)
        manifest["valid"].append(member)
        files |= more
    _, base = stored("invalid/base", sample_base())
    files |= base
    for one in invalid_vectors():
        if not (everything or is_stored(one)):
            continue
        path = f"invalid/{one.name}.sd"
        member = {"name": one.name, "why": one.why, "breaks": one.breaks, "code": one.code}
        member |= {"also": list(one.also)} if one.also else {}
        member |= {"delta": path} | ({"base": "invalid/base"} if one.on_apply else {})
        manifest["invalid"].append(member)
        if path in files:
            raise ValueError(f"two vectors have the path {path}; rename one")
        files[path] = one.delta
    files["manifest.json"] = (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()
    return files


def main(arguments: list[str]) -> int:
    """Run the script; return its exit status."""
    unreleased, everything = arguments == ["--unreleased"], arguments[:1] == ["--all"]
    if len(arguments) != unreleased + 2 * everything:
        print(__doc__, file=sys.stderr)
        return 2
    folder = Path(arguments[1]) if everything else VECTORS
    files = all_files(everything)
    existing = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".gitattributes"
    }
    outdated = [
        path for path in existing if path != "manifest.json" and existing[path] != files.get(path)
    ]
    if outdated and not unreleased:
        print("these exist with other bytes:", *sorted(outdated), sep="\n  ", file=sys.stderr)
        return 1
    for path in outdated:
        (folder / path).unlink()
        for parent in (folder / path).parents:
            if parent == folder or any(parent.iterdir()):
                break
            parent.rmdir()
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    print(f"{len(files)} files, {sum(map(len, files.values()))} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
