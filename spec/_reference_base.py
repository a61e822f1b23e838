"""Checkpoints for the reference decoder: weight sets, names and fingerprints (FORMAT §4.1, §9)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from _reference_json import Refused, check, parse_json
from blake3 import blake3

INDEX_SUFFIX = ".safetensors.index.json"
# By the names that rows use: (dtype, shape, bytes).
Tensors = dict[str, tuple[str, list[int], bytes]]


def prefixes(paths: Iterable[str], read: Callable[[str], bytes]) -> dict[str, str]:
    """Return what stands before a tensor's own name in its row, for each weight file (§4.1)."""
    stems: dict[str, str] = {}
    indexed = {path.removesuffix(INDEX_SUFFIX) for path in paths if path.endswith(INDEX_SUFFIX)}
    for stem in sorted(indexed):
        try:
            shards = set(parse_json(read(stem + INDEX_SUFFIX), "corrupt")["weight_map"].values())
        except (Refused, TypeError, KeyError, AttributeError):
            shards = set()  # some other file with such a name
        folder = stem.rpartition("/")[0]
        stems |= {(f"{folder}/" if folder else "") + str(shard): stem for shard in shards}
    for path in paths:
        if path.endswith(".safetensors") and path not in stems:
            own = path.removesuffix(".safetensors")
            shard_of = re.sub(r"-[0-9]{5}-of-[0-9]{5}$", "", own)
            stems[path] = own if shard_of in indexed else shard_of
    sets = {stem for path, stem in stems.items() if path in paths}
    primary = "model" if "model" in sets or len(sets) != 1 else sets.pop()
    return {path: "" if stem == primary else stem + ":" for path, stem in stems.items()}


def read_safetensors(raw: bytes, prefix: str) -> Tensors:
    """Return the tensors of a safetensors file of the base."""
    n_header = int.from_bytes(raw[:8], "little")
    try:
        header = parse_json(raw[8 : 8 + n_header], "structure_mismatch")
        header.pop("__metadata__", None)
        data, out = raw[8 + n_header :], {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            out[prefix + name] = (entry["dtype"], entry["shape"], data[begin:end])
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise Refused("structure_mismatch", f"the base is no safetensors file: {error}") from error
    return out


def read_base(base: Path, named: set[str]) -> tuple[Tensors, dict[str, Path]]:
    """Return the tensors of the weight sets that hold one of the names `named`, and the files."""
    if base.is_file():
        return read_safetensors(base.read_bytes(), ""), {}
    files = {p.relative_to(base).as_posix(): p for p in sorted(base.rglob("*")) if p.is_file()}
    sets: dict[str, Tensors] = {}
    for path, prefix in prefixes(files, lambda path: files[path].read_bytes()).items():
        if path in files:
            found = read_safetensors(files[path].read_bytes(), prefix)
            tensors = sets.setdefault(prefix, {})
            check(tensors.keys().isdisjoint(found), "structure_mismatch", f"a name twice: {path}")
            tensors.update(found)
    merged: Tensors = {}
    for tensors in sets.values():
        if not named.isdisjoint(tensors):
            check(merged.keys().isdisjoint(tensors), "structure_mismatch", "a name in two sets")
            merged.update(tensors)
    return merged, files


def fingerprint(tensors: Iterable[tuple[str, str, list[int], bytes]]) -> bytes:
    """Return the fingerprint of tensors given as (name, dtype, shape, bytes) (§9)."""
    out = blake3(b"sparsedelta fingerprint 1\0")
    for name, dtype, shape, data in sorted(tensors, key=lambda tensor: tensor[0].encode()):
        out.update(len(name.encode()).to_bytes(4, "little") + name.encode())
        out.update(bytes([len(dtype)]) + dtype.encode() + len(shape).to_bytes(4, "little"))
        out.update(b"".join(n.to_bytes(8, "little") for n in shape) + blake3(data).digest())
    return out.digest()
