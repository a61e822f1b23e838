"""Runs one tool on one pair of weight files; prints time, peak memory and size.

    python benchmarks/opponents.py NAME encode|decode BASE TARGET DELTA

``encode`` writes the delta, ``decode`` rebuilds the target beside it. Times and memory are printed as JSON.
The time starts when the tool is loaded and ends when the file is written.
"""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any

import numpy as np
from layouts import LAYOUTS, Tensors

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

Work = Callable[[Path, Path, Path], object]  # paths of base, target (written by decode) and delta


@dataclass(frozen=True, slots=True)
class Opponent:
    """A tool with its two functions.

    Attributes:
        needs: a module or, after "!", a command; if it is missing the tool is left out.
        encode, decode: functions of the paths of base, target and delta.
        any_dtype: whether the tool works on dtypes other than bf16.
        largest: size in bytes above which a slow tool is left out.
    """

    needs: str
    encode: Work
    decode: Work
    any_dtype: bool = True
    largest: int = 1 << 62

    @property
    def is_there(self) -> bool:
        """Whether the module or command is installed."""
        return bool(which(self.needs[1:]) if self.needs[0] == "!" else find_spec(self.needs))


def _sparsedelta(level: str, *, standalone: bool = False) -> Opponent:
    from sparsedelta import apply, diff  # loads both now, as they are imported lazily

    def encode(base: Path, target: Path, delta: Path) -> None:
        with diff(base, target, level=level, standalone=standalone) as made:
            made.save(delta)

    return Opponent("sparsedelta", encode, lambda base, out, delta: apply(base, delta, out))


def read(path: Path) -> Tensors:
    """Return the tensors of a weight file as unsigned integers of their width."""
    raw = np.memmap(path, np.uint8, "r")
    n = int.from_bytes(raw[:8].tobytes(), "little")
    header: dict[str, Any] = json.loads(raw[8 : 8 + n].tobytes())
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        width = (end - begin) // max(1, math.prod(entry["shape"]))
        bits = raw[8 + n + begin : 8 + n + end].view(f"<u{width or 1}")
        found[name] = (tuple(entry["shape"]), bits)
    return found


def _write_like(base: Path, tensors: Tensors, out: Path) -> None:
    """Write tensors with the header of the base."""
    raw = base.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    header: dict[str, Any] = json.loads(raw[8 : 8 + n])
    header.pop("__metadata__", None)
    order = sorted(header, key=lambda name: header[name]["data_offsets"])
    out.write_bytes(raw[: 8 + n] + b"".join(tensors[name][1].tobytes() for name in order))


def _layout(name: str) -> Opponent:
    layout = LAYOUTS[name]

    def encode(base: Path, target: Path, delta: Path) -> None:
        delta.write_bytes(layout.encode(read(base), read(target)))

    def decode(base: Path, out: Path, delta: Path) -> None:
        _write_like(base, layout.decode(read(base), delta.read_bytes()), out)

    return Opponent("numpy", encode, decode, any_dtype=False)


def _z4ai_encode(base: Path, target: Path, delta: Path) -> None:
    from z4ai import model_delta

    model_delta.compress_file(str(target), str(base), str(delta))


def _z4ai_decode(base: Path, out: Path, delta: Path) -> None:
    from z4ai import model_delta

    model_delta.decompress_file(str(delta), str(base), str(out))


def _fireworks_encode(base: Path, target: Path, delta: Path) -> None:
    from fireworks_delta_compression import compression

    compression.delta_compress_files_to_file(
        src=str(base), dst=str(target), diff_file=str(delta), compression_format="arc_v2"
    )


def _fireworks_decode(base: Path, out: Path, delta: Path) -> None:
    from fireworks_delta_compression import compression
    from safetensors.torch import load_file, save_file

    made = compression.delta_decompress_dict_from_file(
        src=load_file(base), diff_file=str(delta), compression_format="arc_v2"
    )
    save_file(made[0] if isinstance(made, tuple) else made, out)


def _weightscope_encode(base: Path, target: Path, delta: Path) -> None:
    from weightscope.export_patch import export_patch

    export_patch(str(base.parent), str(target.parent), delta, threshold=0.0)


def _weightscope_decode(base: Path, out: Path, delta: Path) -> None:
    from weightscope.apply_patch import apply_patch

    apply_patch(delta, str(base.parent), out)


def _zipnn_encode(base: Path, target: Path, delta: Path) -> None:
    import zipnn

    tool = zipnn.ZipNN(bytearray_dtype="bfloat16", delta_compressed_type="byte")
    content = bytearray(target.read_bytes())
    delta.write_bytes(tool.compress(content, delta_second_data=bytearray(base.read_bytes())))


def _zipnn_decode(base: Path, out: Path, delta: Path) -> None:
    import zipnn

    tool = zipnn.ZipNN(bytearray_dtype="bfloat16", delta_compressed_type="byte")
    content = bytearray(delta.read_bytes())
    out.write_bytes(tool.decompress(content, delta_second_data=bytearray(base.read_bytes())))


_ZSTD = ("zstd", "-q", "-f", "--long=30")


def _zstd_encode(base: Path, target: Path, delta: Path) -> None:
    command: list[str | Path] = [*_ZSTD, f"--patch-from={base}", target, "-o", delta]
    subprocess.run(command, check=True)


def _zstd_decode(base: Path, out: Path, delta: Path) -> None:
    command: list[str | Path] = [*_ZSTD, "-d", f"--patch-from={base}", delta, "-o", out]
    subprocess.run(command, check=True)


def _bsdiff_encode(base: Path, target: Path, delta: Path) -> None:
    import bsdiff4

    bsdiff4.file_diff(base, target, delta)


def _bsdiff_decode(base: Path, out: Path, delta: Path) -> None:
    import bsdiff4

    bsdiff4.file_patch(base, out, delta)


OPPONENTS = {
    "sparsedelta": _sparsedelta("default"),
    "sparsedelta --standalone": _sparsedelta("default", standalone=True),
    "sparsedelta --level fast": _sparsedelta("fast"),
    "sparsedelta --level max": _sparsedelta("max"),
    "z4ai model_delta": Opponent("z4ai", _z4ai_encode, _z4ai_decode),
    "fireworks (zstd of XOR)": Opponent(
        "fireworks_delta_compression", _fireworks_encode, _fireworks_decode
    ),
    "weightscope": Opponent("weightscope", _weightscope_encode, _weightscope_decode),
    "zipnn delta": Opponent("zipnn", _zipnn_encode, _zipnn_decode, any_dtype=False),
    "zstd --patch-from": Opponent("!zstd", _zstd_encode, _zstd_decode, largest=1 << 27),
    "bsdiff": Opponent("bsdiff4", _bsdiff_encode, _bsdiff_decode, largest=1 << 25),
    **{f"{name} layout": _layout(name) for name in LAYOUTS},
}


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def main(name: str, action: str, base: str, target: str, delta: str) -> int:
    """Run one tool in one direction."""
    opponent = OPPONENTS[name]
    if opponent.needs[0] != "!":
        __import__(opponent.needs)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak of memory
    before = _peak_bytes()
    start, cpu = time.perf_counter(), time.process_time()
    work = opponent.encode if action == "encode" else opponent.decode
    work(Path(base), Path(target), Path(delta))
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    took = {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu + children.ru_utime + children.ru_stime,
        "peak_bytes": max(_peak_bytes() - before, 1024 * children.ru_maxrss),
    }
    print(json.dumps(took))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
