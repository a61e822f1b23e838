"""ARC2 files of Fireworks: for each shard of the base, the zstd frames of the XOR of all of its tensors."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sparsedelta.codecs.values import Bits
from sparsedelta.errors import Corrupt, StructureMismatch
from sparsedelta.files.checkpoint import Checkpoint
from sparsedelta.format.records import TensorSpec
from sparsedelta.interop.abilities import Abilities
from sparsedelta.interop.digests import check_digest
from sparsedelta.interop.files import (
    Array,
    TensorFile,
    exactly_unpacked,
    packed,
    vector,
    write_safetensors,
)
from sparsedelta.interop.form import Form, Reading, Setting
from sparsedelta.interop.source import Source
from sparsedelta.interop.transition import Transition
from sparsedelta.interop.view import PatchedCheckpoint, bits_of

_LEVEL = 3
_ZSTD = b"\x28\xb5\x2f\xfd"


class Arc2(Form):
    """The XOR of each tensor, with an Adler-32 checksum of its new bytes."""

    name = "arc2"
    title = "Fireworks, ARC2 incremental snapshot"
    source = "fireworks-delta-compression 0.1.0, backends/arc2.py"
    is_folder = True
    abilities = Abilities(proof="all tensors")

    def recognise(self, source: Source) -> bool:
        """Return whether all tensors of all safetensors files are zstd frames with a decimal checksum."""
        shards = _shards(source)
        return bool(shards) and all(_is_shard(shard) for shard in shards)

    def read(self, source: Source, base: Checkpoint) -> Reading:
        """Return the delta, opened with its base; see ``Form.read``."""
        patches: dict[str, _Xor] = {}
        for shard in _shards(source):
            with TensorFile(shard) as file:
                for name in file.tensors:
                    if name in patches:
                        raise Corrupt(f"tensor {name!r} is in two shards; the delta is damaged")
                    patches[name] = _Xor(name, file.bits(name, "U8"), file.metadata[name])
        missing = sorted({tensor.name for tensor in base.tensors.values()} - patches.keys())
        if missing:
            raise StructureMismatch(
                f"tensor {missing[0]!r} is in the base '{base.path}' and not in the delta, but ARC2 lists all"
                " tensors; use the base that the delta was made from, with all of the delta's shards",
                tensor=missing[0],
            )
        target = PatchedCheckpoint(base, patches)

        def check() -> None:
            for tensor in target.tensors.values():
                bits_of(tensor)  # compares the checksum

        return Reading(target, "all tensors", check=check)

    def write(self, change: Transition, out: Path, settings: Mapping[str, Setting]) -> None:
        """Write the form; see ``Form.write``."""
        frames = {
            one.name: packed((one.old ^ one.new).tobytes(), _LEVEL) for one in change.changed()
        }
        new = {tensor.name: tensor for tensor in change.all_tensors()}
        out.mkdir()
        for file in change.base.weight_files:
            tensors: dict[str, Array] = {}
            checksums: dict[str, str] = {}
            for tensor in file.tensors:
                frame = frames.get(tensor.name)
                if frame is None:
                    frame = packed(bytes(tensor.spec.n_bytes), _LEVEL)
                tensors[tensor.name] = vector("U8", np.frombuffer(frame, np.uint8))
                source = new[tensor.name] if tensor.name in frames else tensor
                checksums[tensor.name] = _adler32(bits_of(source))
            (out / file.path).parent.mkdir(parents=True, exist_ok=True)
            write_safetensors(out / file.path, tensors, checksums)


@dataclass(frozen=True, slots=True)
class _Xor:
    """The XOR of one tensor."""

    name: str
    frame: npt.NDArray[np.uint8]
    checksum: str

    def __call__(self, old: Bits, spec: TensorSpec) -> Bits:
        """Return the new bits; see ``Patch``."""
        data = old.view(np.uint8)
        what = f"the change of tensor {self.name!r}"
        if len(data):
            data ^= np.frombuffer(exactly_unpacked(self.frame.data, len(data), what), np.uint8)
        check_digest(self.name, _adler32(old), self.checksum)
        return old


def _adler32(bits: Bits) -> str:
    return str(zlib.adler32(bits.view(np.uint8).data))


def _shards(source: Source) -> list[Path]:
    if not source.is_folder:
        return [source.path] if source.tensors else []
    return sorted(path for path in source.path.rglob("*.safetensors") if path.is_file())


def _is_shard(path: Path) -> bool:
    shard = Source(path)
    if not shard.tensors or shard.tensors != shard.metadata.keys():
        return False
    if not all(value.isascii() and value.isdigit() for value in shard.metadata.values()):
        return False
    try:
        with TensorFile(path) as file:
            first = min(file.tensors, key=lambda name: file.tensors[name].spec.n_bytes)
            return all(file.dtype(name) == "U8" for name in file.tensors) and (
                file.bits(first, "U8")[:4].tobytes() == _ZSTD
            )
    except Corrupt:
        return False
