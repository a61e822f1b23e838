"""Check the forms of other projects with their own code, measure their sizes, and write the tables of docs/interop.md.

The code of other projects comes from packages (`make interop` installs them) and from a folder of source files
that you fetch yourself (--sources), laid out as in docs/interop.md. A reader that is not there is reported as such.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import shutil
import sys
import tempfile
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import sparsedelta
from sparsedelta.interop.form import Form
from sparsedelta.interop.registry import FORMS
from sparsedelta.interop.vllm import from_patches, to_patches

PAGE = Path(__file__).parents[1] / "docs" / "interop.md"
State = dict[str, torch.Tensor]
FILE = "model.safetensors"


class Absent(Exception):
    """The other project's code is not there."""


@dataclass(frozen=True)
class Foreign:
    """The code of another project.

    Attributes:
        form: name of the form.
        code: where the code comes from.
        settings: settings to write with.
        read: applies a file that we wrote to a base, and returns the state.
        write: writes a file from a base and a target.
    """

    form: str
    code: str
    settings: Mapping[str, str]
    read: Callable[[Path, Path], State]
    write: Callable[[Path, Path, Path], None]


def state(folder: Path) -> State:
    """Return the tensors of a checkpoint."""
    return load_file(folder / FILE)


def source(folder: Path | None, *parts: str) -> Any:
    """Return a module of the folder of sources, imported as part of a package of its own."""
    path = (folder or Path("-")).joinpath(*parts)
    if not path.exists():
        raise Absent(f"no {'/'.join(parts)} in --sources")
    package = f"foreign_{parts[0]}"
    if package not in sys.modules:
        module = types.ModuleType(package)
        module.__path__ = [str(path.parent)]
        sys.modules[package] = module
    return importlib.import_module(f"{package}.{path.stem}")


def package(name: str, module: str) -> Any:
    """Return a module of an installed package."""
    try:
        version(name)
    except PackageNotFoundError as error:
        raise Absent(f"{name} is not installed") from error
    return importlib.import_module(module)


def without_vllm() -> None:
    """Let TRL's engine be imported where vLLM is not installed: its codec does not use vLLM."""
    for name in ("vllm", "vllm.distributed", "vllm.distributed.weight_transfer"):
        sys.modules.setdefault(name, types.ModuleType(name))
    base = types.ModuleType("vllm.distributed.weight_transfer.base")
    for name in ("SparseWeightPatch", "WeightTransferInitInfo", "WeightTransferUpdateInfo"):
        setattr(base, name, type(name, (), {}))
    base.WeightTransferEngine = type(  # type: ignore[attr-defined]
        "WeightTransferEngine", (), {"__class_getitem__": classmethod(lambda cls, _: cls)}
    )
    factory = types.ModuleType("vllm.distributed.weight_transfer.factory")
    factory.WeightTransferEngineFactory = types.SimpleNamespace(  # type: ignore[attr-defined]
        _registry={}, register_engine=lambda *_: None
    )
    sys.modules.setdefault(base.__name__, base)
    sys.modules.setdefault(factory.__name__, factory)
    import huggingface_hub

    for name in ("batch_bucket_files", "download_bucket_files"):
        if not hasattr(huggingface_hub, name):
            setattr(huggingface_hub, name, None)


def trl_v1(folder: Path | None) -> Foreign:
    """Return TRL's code for v1."""
    code = source(folder, "trl_v1", "weight_diff.py")

    def read(path: Path, base: Path) -> State:
        found: State = code.apply_sparse_patch(state(base), path)
        return found

    def write(base: Path, target: Path, out: Path) -> None:
        tensors, metadata = code.encode_sparse_patch(state(base), state(target), 1, 0, 0)
        save_file(tensors, out, metadata)

    return Foreign("trl-v1", "weight_diff.py of huggingface/trl at a46bf262d", {}, read, write)


def trl_v2(folder: Path | None, encoding: str) -> Foreign:
    """Return TRL's code for v2."""
    without_vllm()
    code = source(folder, "trl_v2", "delta_engine.py")
    from safetensors import safe_open

    def read(path: Path, base: Path) -> State:
        found = state(base)
        with safe_open(path, framework="pt") as file:
            for name, indices, values in code.iter_sparse_patches(file):
                found[name].view(-1)[indices.long()] = values
        return found

    def write(base: Path, target: Path, out: Path) -> None:
        old, new = state(base), state(target)
        items = (
            (name, tensor, tensor.view(torch.int16) != old[name].view(torch.int16))
            for name, tensor in new.items()
        )
        tensors, metadata = code.encode_patch(items, 1, encoding)
        save_file(tensors, out, metadata.to_metadata_dict())

    title = "delta_engine.py of huggingface/trl at 019ac7357"
    return Foreign("trl-v2", title, {"encoding": encoding}, read, write)


def slime(folder: Path | None, encoding: str, checksum: str) -> Foreign:
    """Return the code of slime, which SGLang uses to receive."""
    code = source(folder, "slime", "disk_delta.py")

    def read(path: Path, base: Path) -> State:
        with tempfile.TemporaryDirectory() as temporary:
            local, root = Path(temporary) / "local", Path(temporary) / "root"
            root.mkdir()
            shutil.copytree(path, root / "weight_v000001")
            code.init_local_checkpoint(str(local), str(base))
            code.apply_deltas(str(local), str(root), 1)
            return {name: tensor.clone() for name, tensor in state(local).items()}

    def write(base: Path, target: Path, out: Path) -> None:
        import json

        import zstandard

        out.mkdir()
        old, new, tensors, digests = state(base), state(target), {}, {}
        for name, tensor in new.items():
            before, after = (t.reshape(-1).view(torch.uint8).numpy() for t in (old[name], tensor))
            if (before != after).any():
                raw = before ^ after
                if encoding == "overwrite":
                    raw = code.overwrite_encode(after, before != after)
                frame = zstandard.ZstdCompressor().compress(raw.tobytes())
                tensors[name] = torch.frombuffer(bytearray(frame), dtype=torch.uint8)
                digests[name] = code.checksum(checksum, after)
        shard = "model-00000-of-00001.safetensors"
        save_file(tensors, out / shard, digests)
        metadata = {
            "version": "000001", "base_version": "000000", "delta_encoding": encoding,
            "compression_format": "zstd", "checksum_format": checksum,
        }  # fmt: skip
        index = {"metadata": metadata, "weight_map": dict.fromkeys(tensors, shard)}
        (out / "model.safetensors.index.json").write_text(json.dumps(index))

    title = "slime/utils/disk_delta.py of THUDM/slime at 6b5b07a6a"
    return Foreign("slime", title, {"encoding": encoding, "checksum": checksum}, read, write)


def skyrl(folder: Path | None) -> Foreign:
    """Return the code of SkyRL."""
    parent = "skyrl.backends.skyrl_train.weight_sync"
    names = [parent.rsplit(".", n)[0] for n in range(parent.count("."), -1, -1)]
    for name in (*names, f"{parent}.base"):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules[f"{parent}.base"].WeightChunk = object  # type: ignore[attr-defined]
    sys.modules[f"{parent}.delta_payload"] = source(folder, "skyrl", "delta_payload.py")
    code = source(folder, "skyrl", "delta_checkpoint.py")

    def read(path: Path, base: Path) -> State:
        with tempfile.TemporaryDirectory() as temporary:
            store = code.LocalCheckpointStore(str(base), temporary)
            store.fetch(1, uri=str(path))
            return {name: tensor.clone() for name, tensor in state(store.weights_dir).items()}

    def write(base: Path, target: Path, out: Path) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            sync = Path(temporary) / "sync"
            publisher = code.DeltaCheckpointPublisher(str(base), str(sync), f"{temporary}/staging")
            chunk = types.SimpleNamespace(names=[*state(target)], tensors=[*state(target).values()])
            publisher.publish(publisher.create_delta_files([chunk]))
            (folder_of_version,) = sync.iterdir()
            shutil.copytree(folder_of_version, out)

    return Foreign("skyrl", "delta_checkpoint.py of NovaSky-AI/SkyRL at a9564572e", {}, read, write)


def grail(folder: Path | None, number: str) -> Foreign:
    """Return grail's code for one version."""
    code = source(folder, "grail", "sparse_codec.py")
    suffix = {"2": "v2", "3": "v3", "31": "v3_1"}[number]
    encode, decode = (
        getattr(code, f"{verb}_sparse_delta_{suffix}") for verb in ("encode", "decode")
    )

    def read(path: Path, base: Path) -> State:
        found = state(base)
        tensors, shapes = decode(path.read_bytes())
        for name, shape in shapes.items():
            indices = tensors[f"{name}.indices"].long()
            if indices.ndim == 2:
                columns = int(np.prod(shape[1:])) if len(shape) > 1 else 1
                indices = indices[0] * columns + indices[1]
            found[name].view(-1)[indices] = tensors[f"{name}.values"]
        return found

    def write(base: Path, target: Path, out: Path) -> None:
        old, tensors, shapes = state(base), {}, {}
        for name, tensor in state(target).items():
            changed = (tensor.view(torch.int16) != old[name].view(torch.int16)).reshape(-1)
            if changed.any():
                tensors[f"{name}.indices"] = changed.nonzero()[:, 0].int()
                tensors[f"{name}.values"] = tensor.reshape(-1)[changed]
                shapes[name] = list(tensor.shape)
        out.write_bytes(encode(tensors, shapes))

    title = "sparse_codec.py of one-covenant/grail at 54d6342"
    return Foreign("grail", title, {"version": number}, read, write)


def pulse(folder: Path | None, number: int) -> Foreign:
    """Return Basilica's code for one format version."""
    code = package("basilica-sdk", "basilica._pulse.codec")

    def read(path: Path, base: Path) -> State:
        snapshot = code.Snapshot(state(base))
        snapshot.apply_patch(code.parse_patch(path.read_bytes()))
        return dict(snapshot.named_tensors())

    def write(base: Path, target: Path, out: Path) -> None:
        snapshot = code.Snapshot(state(base))
        meta = code.ModelMeta("model", snapshot.digest(), snapshot.param_count())
        patch, _ = snapshot.encode_step(
            state(target).items(), step=1, base_step=0, model=meta, format_version=number
        )
        out.write_bytes(patch)

    title = f"basilica-sdk {version('basilica-sdk')}"
    return Foreign("pulsept1", title, {"version": str(number)}, read, write)


def arc2(folder: Path | None) -> Foreign:
    """Return the code of Fireworks."""
    code = package("fireworks-delta-compression", "fireworks_delta_compression.compression")

    def read(path: Path, base: Path) -> State:
        with tempfile.TemporaryDirectory() as temporary:
            copy = shutil.copytree(base, Path(temporary) / "copy")
            code.delta_decompress_inplace(
                base_path=str(copy / FILE), diff_path=str(path / FILE), compression_format="arc_v2"
            )
            return {name: tensor.clone() for name, tensor in state(copy).items()}

    def write(base: Path, target: Path, out: Path) -> None:
        out.mkdir()
        code.delta_compress_files_to_file(
            src=str(base / FILE), dst=str(target / FILE), diff_file=str(out / FILE),
            compression_format="arc_v2",
        )  # fmt: skip

    title = f"fireworks-delta-compression {version('fireworks-delta-compression')}"
    return Foreign("arc2", title, {}, read, write)


MAKERS: list[tuple[str, Callable[[Path | None], Foreign]]] = [
    ("trl-v1", trl_v1),
    ("trl-v2 raw", lambda folder: trl_v2(folder, "raw")),
    ("trl-v2 gap_delta", lambda folder: trl_v2(folder, "gap_delta")),
    *(
        (f"slime {encoding} {checksum}", lambda folder, e=encoding, c=checksum: slime(folder, e, c))
        for encoding in ("xor", "overwrite")
        for checksum in ("blake3", "xxh3-128", "adler32")
    ),
    ("skyrl", skyrl),
    *(
        (f"grail {number}", lambda folder, n=number: grail(folder, n))
        for number in ("2", "3", "31")
    ),
    *((f"pulsept1 {number}", lambda folder, n=number: pulse(folder, n)) for number in (1, 2, 3)),
    ("arc2", arc2),
]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same(one: State, other: State) -> bool:
    """Return whether two states are equal bit for bit."""
    return one.keys() == other.keys() and all(
        torch.equal(bits(one[name]), bits(other[name])) for name in one
    )


WORKLOADS = {
    "1 % of the elements, one step each": (0.01, True),
    "0.1 % of the elements, new values": (0.001, False),
    "40 % of the elements, one step each": (0.4, True),
}


def workload(path: Path, density: float, *, steps: bool) -> tuple[Path, Path]:
    """Write a base and a target: a small BF16 model in which some elements change."""
    draw = np.random.default_rng(0)
    shapes = {
        "embed": (4096, 512),
        **{f"layers.{n}.weight": (1024, 512) for n in range(8)},
        "norm": (512,),
    }
    old, new = {}, {}
    for name, shape in shapes.items():
        normal = draw.normal(0, 0.02, shape).astype(np.float32)
        before = (normal.view(np.uint32) >> 16).astype(np.uint16)
        changed = draw.random(shape) < density
        step = before + draw.choice([-1, 1], shape).astype(np.int64)
        after = np.where(changed, step if steps else draw.integers(0x3C00, 0x3D00, shape), before)
        old[name] = torch.from_numpy(before.view(np.int16)).view(torch.bfloat16)
        new[name] = torch.from_numpy(after.astype(np.uint16).view(np.int16)).view(torch.bfloat16)
    for folder, tensors in ((path / "base", old), (path / "target", new)):
        folder.mkdir(parents=True)
        save_file(tensors, folder / FILE)
    return path / "base", path / "target"


def check(foreign: Foreign, base: Path, target: Path, path: Path) -> tuple[str, str, int]:
    """Return whether the other project reads our file, whether we read its file, and the size of our file."""
    path.mkdir()
    report = sparsedelta.convert(
        target, path / "ours", base=base, write_as=foreign.form, settings=foreign.settings
    )
    theirs_reads = "yes" if same(foreign.read(path / "ours", base), state(target)) else "NO"
    foreign.write(base, target, path / "theirs")
    sparsedelta.apply(base, path / "theirs", path / "out")
    we_read = "yes" if same(state(path / "out"), state(target)) else "NO"
    return theirs_reads, we_read, report.n_bytes


def matrix(folder: Path | None) -> Iterator[str]:
    """Yield the lines of the table of checks and sizes."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        places = [
            workload(root / str(n), density, steps=steps)
            for n, (density, steps) in enumerate(WORKLOADS.values())
        ]
        yield f"| form | it reads ours | we read its | {' | '.join(WORKLOADS)} | checked with |"
        yield "|---|---|---|---:|---:|---:|---|"
        sizes = []
        for base, target in places:
            with sparsedelta.diff(base, target) as delta:
                sizes.append(f"{len(delta.to_bytes()):,}")
        yield f"| sd | | | {' | '.join(sizes)} | |"
        for name, make in MAKERS:
            try:
                foreign = make(folder)
            except Absent as error:
                yield f"| {name} | not checked | not checked | | | | {error} |"
                continue
            found = [
                check(foreign, base, target, root / f"{name}-{n}".replace(" ", "-"))
                for n, (base, target) in enumerate(places)
            ]
            answers = [" ".join(sorted({str(one[part]) for one in found})) for part in (0, 1)]
            shown = " | ".join(f"{one[2]:,}" for one in found)
            yield f"| {name} | {answers[0]} | {answers[1]} | {shown} | {foreign.code} |"
        try:
            yield from vllm_patches(folder, places)
        except Absent as error:
            yield f"| vLLM's patch objects | not checked | not checked | | | | {error} |"


def vllm_patches(folder: Path | None, places: list[tuple[Path, Path]]) -> Iterator[str]:
    """Yield the line of the table about vLLM, whose patches are objects and not files."""
    code = source(folder, "vllm", "checkpoint_weight_patch.py")
    answers = []
    for base, target in places:

        class Model(torch.nn.Module):
            held = state(base)

            def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> set[str]:
                for name, tensor in weights:
                    self.held[name].copy_(tensor)
                return {name for name, _ in weights}

        model = Model()
        with sparsedelta.diff(base, target) as delta:
            patches = to_patches(delta, base=base)
        code.load_checkpoint_weight_patches(model, patches)
        theirs = [code.CheckpointWeightPatch(*patch) for patch in patches]
        with tempfile.TemporaryDirectory() as out, from_patches(theirs, base=base) as back:
            sparsedelta.apply(base, back, f"{out}/out")
            answers.append(
                (same(model.held, state(target)), same(state(Path(out) / "out"), state(target)))
            )
    yes = ["yes" if all(one[part] for one in answers) else "NO" for part in (0, 1)]
    yield f"| vLLM's patch objects | {yes[0]} | {yes[1]} | | | | checkpoint_weight_patch.py of vLLM 0.33.0 |"


def abilities() -> Iterator[str]:
    """Yield the lines of the table of what each form can hold."""
    yield "| name | form | read | written | dtypes that may change | −0 | NaN | digests prove | checked against |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for form in FORMS.values():
        yield _ability(form)


def _ability(form: Form) -> str:
    can = form.abilities
    dtypes = ", ".join(sorted(can.dtypes)) if can.dtypes else "all"
    read, written = ("no" if why else "yes" for why in (form.not_read, form.not_written))
    if form.not_read and form.not_written:
        return f"| `{form.name}` | {form.title} | {read} | {written} | | | | | {form.source} |"
    if can.additive and not form.not_written:
        dtypes += ", where a float32 difference gives the target"
    marks = " | ".join("yes" if mark else "no" for mark in (can.signed_zero, can.nan))
    proof = {
        "none": "nothing",
        "changed tensors": "the changed tensors",
        "all tensors": "the target",
    }
    return (
        f"| `{form.name}` | {form.title} | {read} | {written} | {dtypes} | {marks} |"
        f" {'' if form.not_read else proof[can.proof]} | {form.source} |"
    )


def replaced(text: str, name: str, lines: Iterable[str]) -> str:
    """Return a page with the part between two marks replaced."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    new = "\n".join([begin, *lines, end])
    return pattern.sub(lambda _: new, text)


def main() -> int:
    """Write the tables. Return 1 if the code of a project and this package disagree."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sources", type=Path, help="folder of the other projects' source files")
    parser.add_argument("--check", action="store_true", help="print the matrix, and write nothing")
    arguments = parser.parse_args()
    found = [*matrix(arguments.sources)]
    if arguments.check:
        print("\n".join(found))
    else:
        text = replaced(PAGE.read_text("utf-8"), "abilities", abilities())
        PAGE.write_text(replaced(text, "matrix", found), "utf-8")
    return int(any("| NO |" in line for line in found))


if __name__ == "__main__":
    sys.exit(main())
