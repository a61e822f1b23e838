"""Measures what small hostile files cost: time and peak memory of one call on each.

    python benchmarks/hostile.py --mb 1
    python benchmarks/hostile.py --mb 10

Each call runs in its own process. The files have the given size, and their contents are at the limits
of FORMAT §11 or beyond them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zstandard
from blake3 import blake3
from measuring import options_for, table, work_folder, write_result

HEADER = (
    '{"__metadata__":{"format":"sparsedelta","format_version":"1","manifest_digest":"%s"},'
    '"manifest":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]},'
    '"payload":{"dtype":"U8","shape":[%d],"data_offsets":[%d,%d]}}'
)
LOAD = """
import sys, time
import sparsedelta
sparsedelta.inspect
start = time.process_time()
said = "accepted"
seconds = [0.0, 0.0]
try:
    with sparsedelta.load(sys.argv[1]) as delta:
        seconds[0] = time.process_time() - start
        sparsedelta.inspect(delta)
except sparsedelta.SparseDeltaError as error:
    said = error.code
seconds[1] = time.process_time() - start
status = open("/proc/self/status").read()
peak = int(status.split("VmHWM:")[1].split()[0]) // 1000
print(f"{seconds[0] or seconds[1]:.2f}|{seconds[1]:.2f}|{peak}|{said}")
"""


def structure(**members: Any) -> dict[str, Any]:
    """Return the structure of an empty delta with some members set, as ``target__kind``."""
    names = "names layouts base_files base_names base_layouts keep n_chunks".split()
    columns = "starts spans nnz codings touched raw stored".split()
    target = {"kind": "folder", "digests": True}
    target |= {"weight_files": [], "side_files": [], "empty_folders": []}
    result: dict[str, Any] = {
        "requires": [],
        "base": {"id": None, "n_unused": 0, "files": []},
        "target": target,
        "layouts": [],
        "tensors": {name: [] for name in names},
        "codings": [],
        "chunks": {name: [] for name in columns},
    }
    for path, value in members.items():
        holder, (*parents, last) = result, path.split("__")
        for name in parents:
            holder = holder[name]
        holder[last] = value
    return result


def compressed(raw: bytes) -> bytes:
    """Return content compressed as a zstd frame, or unchanged if that is smaller."""
    return min(zstandard.ZstdCompressor(level=3).compress(raw), raw, key=len)


def build(
    members: dict[str, Any] | bytes,
    digests: bytes = b"",
    notes: bytes = b"{}",
    payload: bytes = b"",
) -> bytes:
    """Return the bytes of a delta with this structure, valid or not."""
    raw = members if isinstance(members, bytes) else compact(members)
    texts = [(text, compressed(text)) for text in (raw, notes)]
    sizes = [len(part) for text in texts for part in text]
    manifest = b"".join(size.to_bytes(4, "little") for size in sizes)
    manifest += b"".join(stored for _, stored in texts) + digests
    m, p = len(manifest), len(payload)
    header = (HEADER % (blake3(manifest).hexdigest(), m, m, p, m, m + p)).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + manifest + payload


def compact(value: Any) -> bytes:
    """Return compact JSON."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def files(n_bytes: int) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each file of about ``n_bytes``."""
    zeros = bytes(n_bytes * 86 // 100)

    def repeated(item: bytes, ratio: float) -> bytes:
        """Return a file whose layouts repeat one item as often as the file size allows."""
        start, end = compact(structure()).split(b'"layouts":[]', 1)
        n = int(ratio * n_bytes) // (len(item) + 1)
        return build(start + b'"layouts":[' + b",".join([item] * n) + b"]" + end, zeros)

    yield "empty lists, too many", repeated(b"[]", 3.9)
    yield "empty lists", repeated(b"[]", 0.45)
    yield "short strings of four-byte letters", repeated('"\U0001f600"'.encode(), 1.9)
    yield "long strings", repeated(b'"' + b"x" * 60 + b'"', 3.9)
    deep = b"[" * (n_bytes // 8) + b"]" * (n_bytes // 8)
    yield "nested lists", build(compact(structure()).replace(b"[]", deep, 1), zeros)
    notes = b'{"a":[' + b",".join([b"[]"] * 349_000) + b"]}"
    yield "notes of 1 MiB of empty lists", build(structure(), notes=notes)
    layouts = [["F32", 32, "f4", [8]]]
    n = min(n_bytes // 18, 1 << 19)
    names = [f"layers.{i}.w" for i in range(n)]
    row = {"layouts": layouts, "tensors__names": names, "tensors__layouts": [0] * n}
    row |= {"tensors__n_chunks": [0] * n, "base__files": ["model.safetensors"]}
    row["target__weight_files"] = [["model.safetensors", n, ["canonical", None]]]
    for what, base in (("added", -1), ("unchanged", 0)):
        members = structure(**row, tensors__base_files=[base] * n)
        yield f"{n:,} {what} tensors", build(members, bytes(16 * (n + 1)))
    n = min(n_bytes // 26, 1 << 20)
    starts = [10 * i for i in range(n)]
    chunk = {"layouts": [["U8", 8, "i1", [1 << 40]]], "tensors__names": ["w"]}
    chunk |= {"tensors__layouts": [0], "tensors__base_files": [-1], "tensors__n_chunks": [n]}
    chunk |= {"codings": [["target", "gaps", "planes", 0]], "chunks__codings": [0] * n}
    chunk |= {"chunks__starts": starts, "chunks__spans": [9] * n, "chunks__nnz": [1] * n}
    chunk |= {"chunks__touched": [0] * n, "chunks__raw": [1] * n, "chunks__stored": [1, 1] * n}
    chunk["target__weight_files"] = [["model.safetensors", 1, ["canonical", None]]]
    yield f"{n:,} chunks", build(structure(**chunk), bytes(16 * (n + 2)), payload=bytes(2 * n))
    n = min(n_bytes // 42, 1 << 16)
    paths = sorted("/".join(["a"] * 62) + f"/{i:06}" for i in range(n))
    sides = structure(target__side_files=[[path, 0, 0] for path in paths])
    yield f"{n:,} side files, 63 folders deep", build(sides, bytes(32 * n))
    n = min(n_bytes // 22, 1 << 16)
    weights = [[f"{i:07}\u00e9.safetensors", 0, ["canonical", None]] for i in range(n)]
    yield f"{n:,} weight files", build(structure(target__weight_files=weights), bytes(16 * n))
    large = {"layouts": [["U8", 8, "i1", [1 << 59]]], "tensors__names": ["w"]}
    large |= {"tensors__layouts": [0], "tensors__base_files": [-1], "tensors__n_chunks": [0]}
    large["target__weight_files"] = [["model.safetensors", 1, ["canonical", None]]]
    yield "a tensor of 2^59 bytes", build(structure(**large), bytes(32))


def main() -> None:
    """Measure all files of one size and write the table."""
    parser = options_for(__doc__, "hostile.md")
    parser.add_argument(
        "--mb", type=float, nargs="+", default=[1.0, 10.0], help="size of the files"
    )
    options = parser.parse_args()
    columns = ["file", "kB", "load, CPU s", "and inspect", "peak MB", "result"]
    rows = []
    with work_folder(options.work_dir, keep=options.keep) as work:
        for mb in options.mb:
            for name, content in files(int(mb * 1e6)):
                path = work / "hostile.sd"
                path.write_bytes(content)
                done = subprocess.run(
                    [sys.executable, "-c", LOAD, str(path)],
                    capture_output=True,
                    text=True,
                    check=True,
                    env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
                )
                rows.append([name, f"{len(content) / 1e3:,.0f}", *done.stdout.strip().split("|")])
        write_result(options.result, "What hostile files cost", [table(columns, rows)], where=work)


if __name__ == "__main__":
    main()
