"""Small hostile files of every form: each is refused, or read, within 256 MB of memory and a minute of CPU time."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
import zstandard
from helpers import Raw, of_array, write, write_file
from interop.interop_helpers import plain_pair

# Runs one action on each path, after it has limited the memory to what the process has and 256 MB.
CHILD = """
import resource, sys
import sparsedelta
from sparsedelta.interop import conversion, mergekit, pulse, vllm
import torch, xxhash, yaml
def apply(path, base):
    sparsedelta.apply(base, path, path + ".out")
def vector(path, base):
    sparsedelta.convert(path, path + ".sd", base=base, read_as="task-vector")
def compare(path, base):
    sparsedelta.convert(path, path + ".sd", base=base)
def mask(path, base):
    sparsedelta.read_mask(path)
def plan(path, base):
    mergekit.read_configuration(path)
action, base, *paths = sys.argv[1:]
torch.ones(2, 2) @ torch.ones(2, 2)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (256 << 20),) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (90, 90))
for path in paths:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    try:
        globals()[action](path, base)
        said = "accepted"
    except (sparsedelta.SparseDeltaError, OSError) as error:
        said = getattr(error, "code", type(error).__name__)
        said = said if len(str(error)) < 1000 + 3 * len(path) else f"{said}, {len(str(error))} characters"
    except ValueError as error:
        said = "ValueError" if action == "plan" else f"ValueError: {error}"
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
    print(path, "|", round(resource.getrusage(resource.RUSAGE_SELF).ru_utime - before, 1), "|", said[:200], flush=True)
"""
CODES = {
    "accepted", "corrupt", "limit_exceeded", "unsupported_version", "unsupported_feature", "structure_mismatch",
    "bad_magic", "checkpoint", "FileNotFoundError", "IsADirectoryError", "ValueError",
}  # fmt: skip

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")


def check(action: str, base: Path, paths: list[Path], *, accepted: int = 0) -> None:
    """Run an action on all paths in one process, and check that each ends with an expected outcome."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, action, str(base), *map(str, paths)],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "MALLOC_ARENA_MAX": "1",
            "OMP_NUM_THREADS": "1",
            "SPARSEDELTA_THREADS": "2",
        },
    )
    outcomes = [line.split(" | ") for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert len(outcomes) == len(paths)
    odd = [one for one in outcomes if one[-1] not in CODES]
    assert not odd
    names = [Path(one[0]).name for one in outcomes if one[-1] == "accepted"]
    assert len(names) == accepted, names
    assert all(path.is_dir() or path.stat().st_size < 2_000_000 for path in paths)


def frame(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=3).compress(data)


def wide_frame() -> bytes:
    """Return a frame that asks for a window of 1 GB."""
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=30)
    made = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return made.compress(bytes(100)) + made.flush()


BOMB = frame(bytes(1 << 28))
DEEP = b"[" * 500_000
EMPTY = b"[" + b"[]," * 300_000 + b"[]]"
HUGE = (1 << 62) + 1
Write = Callable[[str, bytes], Path]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return plain_pair(tmp_path).base


@pytest.fixture
def put(tmp_path: Path) -> Write:
    (tmp_path / "hostile").mkdir()
    return lambda name, content: write(tmp_path / "hostile" / name, content)


def grail(header: bytes, data: bytes = b"") -> bytes:
    return frame(len(header).to_bytes(4, "little") + header + data)


def grail_entry(name: str, **more: Any) -> dict[str, Any]:
    entry = {
        "name": name, "shape": [12, 10], "num_nonzero": 50, "value_dtype": "bfloat16", "indices_offset": 0,
        "indices_size": 200, "values_offset": 200, "values_size": 100, "rows_size": 100, "cols_size": 100,
    }  # fmt: skip
    return entry | more


def grail_of(version: int, entries: list[dict[str, Any]], data: bytes = bytes(1000)) -> bytes:
    return grail(
        json.dumps({"version": version, "tensors": entries}, separators=(",", ":")).encode(), data
    )


def test_grail(base: Path, put: Write) -> None:
    start = b'{"version":2,"tensors":'
    one = grail_entry("proj.weight")
    large = {"num_nonzero": 25_000, "indices_size": 100_000, "values_size": 50_000}
    files = {
        "bomb": BOMB,
        "window": wide_frame(),
        "header of 4 GB": frame(b"\xff" * 4 + start),
        "deep": grail(start + DEEP),
        "empty lists": grail(start + b"[" + b"[]," * 20_000_000 + b"[]]}"),
        "the same bytes for 4,000 tensors": grail_of(
            2, [grail_entry(str(n), **large) for n in range(4000)], bytes(150_000)
        ),
        "twice": grail_of(2, [one, one]),
        **{
            f"{key} {version}": grail_of(version, [{**one, key: HUGE}])
            for version in (2, 3, 31)
            for key in one
            if key.endswith(("size", "offset", "nonzero"))
        },
        "shape": grail_of(3, [{**one, "shape": [HUGE, HUGE]}]),
        "many dimensions": grail_of(3, [{**one, "shape": [1] * 100_000}]),
        "gaps": grail_of(2, [one], b"\xff\xff\xff\x7f" * 75),
    }
    check("apply", base, [put(name, content) for name, content in files.items()])


def pulse(entries: Any, payload: bytes = b"", version: int = 1) -> bytes:
    header = {
        "formatVersion": version, "step": 1, "baseStep": 0, "tensors": entries, "stateDigest": state(entries),
        "model": {"id": "m", "digest": "", "paramCount": 1},
    }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    return b"PULSEPT1" + len(text).to_bytes(4, "little") + text + payload


def state(entries: Any) -> str:
    digests = [bytes.fromhex(e["tensorDigest"][9:]) for e in entries if isinstance(e, dict)]
    return "xxh3_128:" + xxhash.xxh3_128(b"".join(digests)).hexdigest()


def pulse_entries(version: int, **more: Any) -> list[dict[str, Any]]:
    shared = {
        "dtype": "bf16", "changed": 0, "idxBytes": 0, "valBytes": 0, "tensorDigest": "xxh3_128:" + "0" * 32,
        "idxEnc": ["delta-u16-esc", "rice-gap", "exp-class-rice"][version - 1],
    }  # fmt: skip
    if version > 1:
        shared["valEnc"] = "zz-delta-u8esc"
    return [
        {"name": "norm.weight", "shape": [10], "numel": 10, **shared},
        {"name": "proj.weight", "shape": [12, 10], "numel": 120, **shared, **more},
    ]


def test_pulse(base: Path, put: Write) -> None:
    many = [{**one, "name": f"{n:05}"} for n in range(4000) for one in pulse_entries(1)[:1]]
    files = {
        "header of 4 GB": b"PULSEPT1" + b"\xff" * 4 + bytes(1000),
        "deep": b"PULSEPT1" + len(DEEP).to_bytes(4, "little") + DEEP,
        "empty lists": b"PULSEPT1" + len(EMPTY).to_bytes(4, "little") + EMPTY,
        "4,000 tensors": pulse(many),
    }
    for version in (1, 2, 3):
        files |= {
            f"bomb {version}": pulse(
                pulse_entries(version, changed=120, idxBytes=1500, valBytes=240), BOMB, version
            ),
            f"window {version}": pulse(
                pulse_entries(version, changed=20, idxBytes=60, valBytes=40), wide_frame(), version
            ),
            f"zeros {version}": pulse(
                pulse_entries(version, changed=120, idxBytes=1500, valBytes=240),
                frame(bytes(1740)),
                version,
            ),
            f"ones {version}": pulse(
                pulse_entries(version, changed=120, idxBytes=1500, valBytes=240),
                frame(b"\x1f" + b"\xff" * 1739),
                version,
            ),
        }
        for key in ("changed", "idxBytes", "valBytes", "numel"):
            files[f"{key} {version}"] = pulse(
                pulse_entries(version, **{key: HUGE}), frame(bytes(9)), version
            )
        files[f"shape {version}"] = pulse(
            pulse_entries(version, shape=[HUGE, HUGE], numel=HUGE * HUGE), b"", version
        )
    check("apply", base, [put(name, content) for name, content in files.items()])


def u8(data: bytes) -> Raw:
    return Raw("U8", (len(data),), data)


def test_slime(base: Path, tmp_path: Path) -> None:
    def folder(name: str, content: bytes, encoding: str, index: bytes = b"") -> Path:
        path = tmp_path / name
        shard = "model-00000-of-00001.safetensors"
        write_file(path / shard, {"proj.weight": u8(content)}, {"proj.weight": "0" * 64})
        metadata = {
            "delta_encoding": encoding, "compression_format": "zstd", "checksum_format": "blake3",
        }  # fmt: skip
        text = json.dumps({"metadata": metadata, "weight_map": {"proj.weight": shard}}).encode()
        write(path / "model.safetensors.index.json", index or text)
        return path

    many = {"delta_encoding": "xor", "compression_format": "zstd", "checksum_format": "blake3"}
    shards = {str(n): f"{n}.safetensors" for n in range(20_000)}
    index = json.dumps({"metadata": many, "weight_map": shards}).encode()
    paths = [
        folder("bomb", BOMB, "xor"),
        folder("bomb2", BOMB, "overwrite"),
        folder("window", wide_frame(), "xor"),
        folder("count", frame(b"\xff" * 4 + bytes(1000)), "overwrite"),
        folder("places", frame(struct.pack("<I", 240) + b"\xff" * 1200), "overwrite"),
        folder("shards", b"", "xor", index),
        folder("deep", b"", "xor", DEEP),
        folder("lists", b"", "xor", EMPTY),
    ]
    check("apply", base, paths)


def test_skyrl_and_arc2(base: Path, tmp_path: Path) -> None:
    def folder(name: str, content: bytes, names: list[str]) -> Path:
        path = tmp_path / name
        write_file(path / "x.safetensors", {"k": u8(content)})
        records = [
            {"name": one, "payload_file": "x.safetensors", "payload_key": "k", "checksum": "0"}
            for one in names
        ]
        manifest = {"payload_files": [], "base_version": 0, "version": 1, "tensors": records}
        write(path / "manifest.json", json.dumps(manifest, separators=(",", ":")).encode())
        return path

    bomb = {"proj.weight": u8(BOMB), "norm.weight": u8(frame(bytes(20)))}
    write_file(tmp_path / "arc" / "model.safetensors", bomb, dict.fromkeys(bomb, "1"))
    paths = [
        folder("bomb", BOMB, ["proj.weight"]),
        folder("window", wide_frame(), ["proj.weight"]),
        folder("one frame of a megabyte for 15,000 tensors", bytes(1 << 20), [*map(str, range(15_000))]),
        tmp_path / "arc",
    ]  # fmt: skip
    check("apply", base, paths)


def test_trl(base: Path, tmp_path: Path) -> None:
    def file(name: str, tensors: dict[str, Raw], **metadata: str) -> Path:
        return write_file(
            tmp_path / "trl" / name, tensors, {"format": "sparse_weight_patch", **metadata}
        )

    n = 150_000
    values = of_array("BF16", np.zeros(n, np.uint16))
    gaps = of_array("U32", np.full(n, 0xFFFFFFFF, np.uint32))
    places = of_array("I32", np.full(n, -1, np.int32))
    v1 = {"proj.weight.indices": places, "proj.weight.values": values}
    paths = [
        file("gaps", {"proj.weight.idx": gaps, "proj.weight.val": values}, encoding="gap_delta"),
        file("raw", {"proj.weight.idx": places, "proj.weight.val": values}, encoding="raw"),
        file("places", v1, changed_params='["proj.weight"]'),
        file("deep", v1, changed_params=DEEP.decode()),
        file("digits", v1, changed_params="[" + "9" * 100_000 + "]"),
    ]
    check("apply", base, paths)


def test_adapters(base: Path, tmp_path: Path) -> None:
    prefix = "base_model.model."

    def folder(name: str, tensors: dict[str, Raw], **config: Any) -> Path:
        path = tmp_path / name
        named = {prefix + key: tensor for key, tensor in tensors.items()}
        write_file(path / "adapter_model.safetensors", named, {"format": "pt"})
        text = json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1, **config})
        write(path / "adapter_config.json", text.encode())
        return path

    def matrices(module: str, rows: int, columns: int, rank: int = 1) -> dict[str, Raw]:
        return {
            f"{module}.lora_A.weight": Raw("F16", (rank, columns), bytes(2 * rank * columns)),
            f"{module}.lora_B.weight": Raw("F16", (rows, rank), bytes(2 * rows * rank)),
        }

    fits = matrices("proj", 12, 10)
    places = of_array("I32", np.full((2, 5), (1 << 31) - 1, np.int32))
    shira = {"proj.shira_indices": places, "proj.shira_weight": of_array("F32", np.ones(5, "f4"))}
    names = {f"m{n}": 1 for n in range(4096)}
    paths = [
        folder("200,000 by 200,000", matrices("proj", 200_000, 200_000)),
        folder("rank 0", matrices("proj", 12, 10, 0), r=0),
        folder("no columns", matrices("proj", 200_000, 0)),
        folder("a large alpha", fits, lora_alpha=10**400),
        folder("infinite alpha", fits, lora_alpha=1e308, r=1.0),
        folder("a large rank", fits, r=10**400),
        folder("ranks", fits, rank_pattern={f"m{n}": 1 for n in range(5000)}),
        folder("alphas", {k: v for n in range(1500) for k, v in matrices(f"a{n}", 1, 1).items()},
               alpha_pattern=names, rank_pattern=names),
        folder("deep", fits, target_modules=json.loads("[" * 60 + "]" * 60)),
        folder("shira", shira, peft_type="SHIRA"),
    ]  # fmt: skip
    check("apply", base, paths, accepted=1)  # deep lists of target modules, which do not matter
    vectors = [
        write_file(tmp_path / "v1", {"proj.weight": Raw("F32", (0, 1 << 60), b"")}),
        write_file(
            tmp_path / "v2", {f"t{n}": of_array("F32", np.zeros(1, "f4")) for n in range(10_000)}
        ),
    ]
    check("vector", base, vectors)


def gguf(n_tensors: int, n_values: int, rest: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_values) + rest


def gguf_tensor(name: bytes, shape: tuple[int, ...], offset: int) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return struct.pack("<Q", len(name)) + name + dims + struct.pack("<IQ", 0, offset)


def test_gguf(put: Write) -> None:
    good = put("base.gguf", gguf(1, 0, gguf_tensor(b"w", (8,), 0) + bytes(100)))
    array = struct.pack("<QcI", 1, b"k", 9)
    files = {
        "tensors": gguf(1 << 63, 0, bytes(1000)),
        "values": gguf(1, 1 << 63, bytes(1000)),
        "most tensors": gguf(1 << 20, 0, bytes(1000)),
        "most values": gguf(1, 1 << 20, bytes(1 << 20)),
        "a long name": gguf(1, 0, struct.pack("<Q", 1 << 63) + bytes(1000)),
        "strings": gguf(1, 1, array + struct.pack("<IQ", 8, 1 << 62) + bytes(1 << 20)),
        "bytes": gguf(1, 1, array + struct.pack("<IQ", 12, 1 << 62) + bytes(1000)),
        "arrays": gguf(1, 1, array + struct.pack("<IQ", 9, 1 << 62) + bytes(1000)),
        "a large shape": gguf(1, 0, gguf_tensor(b"w", (1 << 63,) * 4, 0) + bytes(100)),
        "a far offset": gguf(1, 0, gguf_tensor(b"w", (8,), (1 << 64) - 1) + bytes(100)),
        "one offset": gguf(20_000, 0, b"".join(gguf_tensor(b"%05d" % n, (8,), 0) for n in range(20_000))),
        "alignment": gguf(1, 1, struct.pack("<Q", 17) + b"general.alignment" + struct.pack("<II", 4, 1 << 31)
                          + gguf_tensor(b"w", (8,), 0)),
        "a name of a megabyte": gguf(1, 0, gguf_tensor(b"w" * (1 << 20), (8,), 0) + bytes(100)),
    }  # fmt: skip
    paths = [put(f"{number}.gguf", content) for number, content in enumerate(files.values())]
    check("compare", good, paths, accepted=1)


def varint(number: int) -> bytes:
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def onnx(*tensors: bytes) -> bytes:
    return field(7, b"".join(field(5, tensor) for tensor in tensors))


def test_onnx(put: Write) -> None:
    raw = field(9, bytes(80))
    good = put("base.onnx", onnx(field(8, b"w") + raw))

    def external(**pairs: str) -> bytes:
        return b"".join(
            field(13, field(1, key.encode()) + field(2, value.encode()))
            for key, value in pairs.items()
        )

    dims = b"".join(b"\x08" + varint(HUGE) for _ in range(50_000))
    files = {
        "packed shape": onnx(field(1, b"\x01" * 1_000_000) + raw),
        "shape": onnx(dims + raw),
        "digits": onnx(external(location="x", offset="9" * 5000, length="1") + raw),
        "far": onnx(external(location="x", offset="9" * 18, length="9" * 18)),
        "above": onnx(external(location="../../x", offset="0", length="64")),
        "a long field": varint(7 << 3 | 2) + varint(1 << 62) + bytes(100),
        "integers without end": b"\xff" * 1_000_000,
        "fields": field(7, b"\x08\x01" * 800_000),
        "one name": onnx(*[field(8, b"w") + raw] * 10_000),
        "long names": onnx(*[field(8, b"w" * 60_000) + raw] * 20),
        "deep": b"\x3a\x80\x80\x7a" * 200_000,
    }
    paths = [put(f"{number}.onnx", content) for number, content in enumerate(files.values())]
    check("compare", good, paths, accepted=3)


def archive(pickled: bytes, *, kind: int = zipfile.ZIP_STORED, n_members: int = 1) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", kind) as file:
        file.writestr("m/data.pkl", pickled)
        for number in range(n_members):
            file.writestr(f"m/data/{number}", bytes(64))
    return out.getvalue()


def doubled(start: bytes) -> bytes:
    """Return the operations for a tuple of twice the same tuple, which holds twice the same one, 300 times."""
    return start + b"q\0h\0\x86" * 300


def pickles() -> dict[str, bytes]:
    """Return pickles that state, nest or repeat a lot."""
    key = b"X" + struct.pack("<I", 800) + b"k" * 800
    digits = b"\x8b" + struct.pack("<I", 1 << 19) + b"\x7f" * (1 << 19)
    return {
        "empty lists": b"\x80\x02}" + key + b"](" + b"]" * 500_000 + b"es.",
        "nested lists": b"\x80\x02" + b"(" * 300_000 + b"l" * 300_000 + b".",
        "nested tuples": b"\x80\x02)" + b"\x85" * 900_000 + b".",
        "doubled": b"\x80\x02" + doubled(b")") + b".",
        "a name of doubled tuples": b"\x80\x04" + doubled(b")") + b"\x8c\x01x\x93.",
        "a key of a million digits": b"\x80\x02}" + digits + b"]s.",
        "four gigabytes of text": b"\x80\x02X\xff\xff\xff\xff.",
        "a bytearray": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",
        "operations": b"\x80\x02" + b"N0" * 900_000,
        "memo": b"\x80\x02]" + b"r\xff\xff\xff\xff" * 100_000 + b".",
    }


def test_torch_save(put: Write) -> None:
    torch.save({"w": torch.ones(40)}, path := put("base.pt", b""))
    files = [archive(content) for content in pickles().values()]
    files += [
        archive(bytes(1 << 28), kind=zipfile.ZIP_DEFLATED),
        archive(b"N.", n_members=8000),
        damaged_size(archive(b"N.")),
    ]
    paths = [put(f"{number}.pt", content) for number, content in enumerate(files)]
    check("compare", path, paths, accepted=len(files))  # without names
    check("mask", path, paths, accepted=1)  # an empty list, which is read as no masks


def damaged_size(content: bytes) -> bytes:
    """Return an archive that says that its last member has 4 GB."""
    data = bytearray(content)
    at = data.rindex(b"PK\x01\x02")
    data[at + 20 : at + 28] = b"\xfe\xff\xff\xff" * 2
    return bytes(data)


def test_distributed(put: Write, tmp_path: Path) -> None:
    torch.save({"w": torch.ones(40)}, shard := put("base.pt", b""))
    paths = []
    index = b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n)\x81}X\x03\0\0\0fqn"
    named = b"\x80\x02cx\nMetadata\n)\x81}X\x0c\0\0\0storage_data}%s%bssb."
    hostile = {
        **pickles(),
        "doubled names": named % (index + doubled(b")") + b"sb", index + doubled(b")") + b"sb"),
        "doubled offsets": named
        % (index + b"X\x01\0\0\0wsX\x06\0\0\0offset" + doubled(b"K\x01\x85") + b"sb", b"N"),
    }
    for number, content in enumerate([pickle.dumps(None), *hostile.values()]):
        folder = tmp_path / f"checkpoint-{number}"
        write(folder / "__0_0.distcp", shard.read_bytes())
        paths.append(write(folder / ".metadata", content).parent)
    check("compare", paths[0], paths[1:], accepted=len(paths) - 1)


def test_mergekit(base: Path, put: Write) -> None:
    start = b"merge_method: linear\nbase_model: b\n"
    models = b"models: [{model: x, parameters: {weight: 1}}]\n"
    bomb = b"".join(
        b"a%d: &a%d [%b]\n" % (n + 1, n + 1, b",".join([b"*a%d" % n] * 9)) for n in range(30)
    )
    files = {
        "large": b"a: b\n" * 100_000,
        "deep": b"[" * 60_000,
        "deep blocks": b"- " * 30_000,
        "deep keys": b"{a: " * 15_000,
        "many keys": b"".join(b"%d: x\n" % n for n in range(6000)),
        "mixed keys": start + b"1: x\nfoo: y\n2020-01-01: z\n",
        "aliases": b"a0: &a0 [x]\n" + bomb,
        "merge keys": b"a: &a {x: 1}\nb: {<<: [*a, *a]}\n",
        "digits": start + b"dtype: " + b"9" * 5000 + b"\n" + models,
        "large number": start + b"models: [{model: x, parameters: {weight: 1" + b"0" * 400 + b"}}]\n",
        "a date": start + b"dtype: 2001-99-99\n" + models,
        "a list as dtype": start + b"dtype: [a]\n" + models,
        "a list as key": start + b"? [a]\n: b\n",
        "an object": b"!!python/object/apply:os.system [ls]\n",
        "long texts": b"x" * 60_000 + b": 1\n",
    }  # fmt: skip
    check("plan", base, [put(f"{n}.yml", content) for n, content in enumerate(files.values())])
