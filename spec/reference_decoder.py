"""A second decoder of sparsedelta files, written from FORMAT.md alone. It is simple, short and slow.

It checks every byte of a delta by every rule of FORMAT §12, and applies the delta to a base. It is for
testing other decoders and for learning, not for daily use, because it holds whole checkpoints in memory.

    python reference_decoder.py DELTA                  list the tensors of DELTA
    python reference_decoder.py BASE DELTA OUT         apply DELTA to BASE
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import _reference_bits
import zstandard
from _reference_base import Base, Tensor
from _reference_json import Refused, check, compact, strict_object
from _reference_structure import Chunk, Delta, Row, WeightFile, read_structure
from blake3 import blake3

__all__ = ["Refused", "apply", "decode"]
HEADER = (
    '{"__metadata__":{"format":"sparsedelta","format_version":"VERSION","manifest_digest":"DIGEST"},'
    '"manifest":{"dtype":"U8","shape":[SIZE],"data_offsets":[0,SIZE]},'
    '"payload":{"dtype":"U8","shape":[PAYLOAD],"data_offsets":[SIZE,END]}}'
)


class Cursor:
    """Reads the manifest or the payload piece by piece."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, n: int) -> bytes:
        """Return the next n bytes. If there are fewer, `end` refuses the data."""
        self.at += n
        return self.data[self.at - n : self.at]

    def end(self) -> None:
        """Check that exactly all bytes were taken."""
        check(self.at == len(self.data), "corrupt", "wrong size of the manifest or the payload")


def spaced(text: bytes) -> bytes:
    """Return text followed by the fewest spaces that make its length a multiple of 8."""
    return text + b" " * (-len(text) % 8)


def open_stream(
    data: bytes, raw: int, *, is_plane: bool = False, is_bounded: bool = False
) -> bytes:
    """Return the raw bytes of a stream (§8).

    Args:
        data: the stored bytes.
        raw: the raw size.
        is_plane: whether the stored size may be 0.
        is_bounded: whether the expansion is limited (R10).
    """
    check(len(data) <= raw, "corrupt", "a stream has a stored size above its raw size")
    if len(data) == raw:
        return data
    if not data:
        check(is_plane, "corrupt", "a stream is missing")
        return bytes(raw)
    valid = not is_bounded or raw <= 64 * len(data) + 1024
    check(valid, "limit_exceeded", f"a frame of {len(data)} bytes expands to {raw}")
    try:
        head = zstandard.get_frame_parameters(data)
        check(head.content_size == raw, "corrupt", f"a frame of {head.content_size} bytes")
        check(head.window_size <= 1 << 27, "corrupt", "a frame with a window above 2^27")
        reader = zstandard.ZstdDecompressor(max_window_size=1 << 27)
        return reader.decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise Refused("corrupt", f"damaged frame: {error}") from error


def read_container(raw: bytes) -> tuple[bytes, bytes]:
    """Return the manifest, and all bytes after it (§2); `Cursor.end` checks the payload's size."""
    start = 8 + int.from_bytes(raw[:8], "little")
    check(start <= 8 + 1024, "limit_exceeded", f"a header of {start - 8} bytes")
    check(start <= len(raw), "truncated", "shorter than its header")
    header = raw[8:start]
    pattern = r'.*"format_version":"([^"]*)","manifest_digest":"([0-9a-f]{64})"'
    pattern += r'.*"shape":\[([0-9]+)\].*"shape":\[([0-9]+)\]'
    found = re.match(pattern, header.decode("latin-1"))
    if found is None:
        raise Refused("bad_magic", "not the header of a delta")
    version, digest, size, n_payload = found[1], found[2], int(found[3]), int(found[4])
    expected = HEADER.replace("VERSION", version).replace("DIGEST", digest)
    expected = expected.replace("SIZE", str(size)).replace("PAYLOAD", str(n_payload))
    expected = expected.replace("END", str(size + n_payload))
    check(header == spaced(expected.encode("latin-1")), "bad_magic", "not the header of a delta")
    check(version == "1", "unsupported_version", f"format version {version!r:.40}")
    check(size <= 1 << 27, "limit_exceeded", f"a manifest of {size} bytes")
    end = start + size + n_payload
    check(len(raw) >= end, "truncated", f"the file has {len(raw)} of {end} bytes")
    manifest = raw[start : start + size]
    check(blake3(manifest).hexdigest() == digest, "corrupt", "manifest_digest is wrong")
    return manifest, raw[start + size :]


def read_manifest(manifest: bytes) -> Delta:
    """Return the content of a manifest (§3); each digest is set where it belongs (§9)."""
    cursor = Cursor(manifest)
    raw, stored, n_notes, notes_stored = (
        int.from_bytes(cursor.take(4), "little") for _ in range(4)
    )
    check(raw <= 4 * len(manifest) + (1 << 19), "limit_exceeded", f"a structure of {raw} bytes")
    check(n_notes <= 1 << 20, "limit_exceeded", f"notes of {n_notes} bytes")
    structure = open_stream(cursor.take(stored), raw)
    n_values = sum(structure.count(mark) for mark in b",[{")
    valid = n_values <= len(manifest) // 3 + (1 << 16)
    check(valid, "limit_exceeded", f"{n_values} values in the structure")
    delta = read_structure(structure)
    strict_object(open_stream(cursor.take(notes_stored), n_notes), "corrupt")
    for file in delta.weight_files:
        file.digest = cursor.take(16)
    for side in delta.side_files:
        side.digest = cursor.take(32)
    for row in delta.rows:
        row.base_digest = cursor.take(16) if row.base_file is not None else b""
    for row in delta.rows:
        if row.is_copied:
            row.target_digest = row.base_digest
        elif row.base_file is None or delta.has_target_digests:
            row.target_digest = cursor.take(16)
    for chunk in delta.chunks:
        chunk.digest = cursor.take(16)
    for chunk in delta.chunks:
        chunk.touched = cursor.take(16) if chunk.has_touched else None
    cursor.end()
    return delta


def canonical_members(file: WeightFile) -> dict[str, Any]:
    """Return the members of a canonical header except `__metadata__` (§3.2)."""
    out, begin = {}, 0
    for row in file.rows:
        end = begin + row.layout.n_bits // 8
        entry = {"dtype": row.layout.dtype, "shape": row.layout.shape}
        out[row.name] = entry | {"data_offsets": [begin, end]}
        begin = end
    return out


def read_header(file: WeightFile, cursor: Cursor) -> bytes:
    """Return the bytes of a weight file's header (§3.2)."""
    members = canonical_members(file)
    if file.stored is None:
        first = {} if file.metadata is None else {"__metadata__": dict(file.metadata)}
        return spaced(compact(first | members))
    header = open_stream(cursor.take(file.stored[1]), file.stored[0], is_bounded=True)
    valid = header[:1] == b"{" and header.rstrip(b" ")[-1:] == b"}"
    check(valid, "corrupt", f"stored header of {file.path!r:.40}")
    found = strict_object(header, "corrupt")
    metadata = found.pop("__metadata__", {})
    valid = type(metadata) is dict and all(type(text) is str for text in metadata.values())
    check(valid, "corrupt", f"metadata of the stored header of {file.path!r:.40}")
    # Compared as text, because 1, 1.0 and True are equal in Python.
    same = {name: sorted(map(str, entry.items())) for name, entry in members.items()}
    for name, entry in found.items():
        check(type(entry) is dict, "corrupt", f"stored header of {file.path!r:.40}")
        found[name] = sorted(map(str, entry.items()))
    check(found == same, "corrupt", f"stored header of {file.path!r:.40}")
    return header


def decode_chunk(row: Row, chunk: Chunk, old: bytes) -> list[tuple[int, int, int]]:
    """Return flat index, bits in the row's start, and code of each touched element (§5 to §7).

    Args:
        row: the row.
        chunk: one of its chunks.
        old: the bytes that the row keeps of its base tensor. They may be missing for a chunk without
            classes; then only the positions and codes are right.
    """
    w = row.layout.width
    _, index, packing, has_classes = chunk.coding
    begin, end = chunk.start * w, (chunk.start + chunk.span) * w
    data = old[begin:end].ljust(end - begin, b"\0")

    def before(p: int) -> int:
        return int.from_bytes(data[p * w : (p + 1) * w], "little")

    every = range(chunk.span)
    keys = [_reference_bits.key(before(p), w) for p in every] if has_classes else []
    stream, *rest = chunk.streams
    found = _reference_bits.positions(index, stream, chunk.nnz, chunk.span, keys)
    touched_keys = [keys[p] for p in found] if keys else []
    codes = _reference_bits.codes(packing, rest, chunk.nnz, w, touched_keys)
    return [(chunk.start + p, before(p), code) for p, code in zip(found, codes, strict=True)]


def decode(path: Path | str) -> Delta:
    """Return a delta after checking every rule that needs no base (§12).

    Raises:
        Refused: the delta breaks a rule.
    """
    manifest, payload = read_container(Path(path).read_bytes())
    delta = read_manifest(manifest)
    cursor = Cursor(payload)
    for side in delta.side_files:
        if side.stored >= 0:
            side.content = open_stream(cursor.take(side.stored), side.n_bytes, is_bounded=True)
            valid = blake3(side.content).digest() == side.digest
            check(valid, "corrupt", f"digest of {side.path!r:.40}")
    for file in delta.weight_files:
        file.header = read_header(file, cursor)
        valid = blake3(file.header).digest()[:16] == file.digest
        check(valid, "corrupt", f"digest of the header of {file.path!r:.40}")
    for chunk in delta.chunks:
        stored = [cursor.take(size) for size in chunk.stored]
        valid = blake3(b"".join(stored)).digest()[:16] == chunk.digest
        check(valid, "corrupt", "digest of a chunk")
        for i, (data, raw) in enumerate(zip(stored, chunk.raw, strict=True)):
            is_plane = i > 0 and chunk.coding[2] == "planes"
            chunk.streams.append(open_stream(data, raw, is_plane=is_plane))
    cursor.end()
    for row in delta.rows:
        for chunk in row.chunks:
            if row.keep == 0 or not chunk.coding[3]:
                decode_chunk(row, chunk, b"")
    return delta


def target_bytes(row: Row, old: bytes) -> bytes:
    """Return the bytes of a target tensor, given those of its base tensor (§4, §7)."""
    w = row.layout.width
    old = old[: row.keep * w]
    out = bytearray(old.ljust(row.layout.n_elements * w, b"\0"))
    for chunk in row.chunks:
        digests = blake3(), blake3()
        for position, before, code in decode_chunk(row, chunk, old):
            is_float = row.layout.element[0] == "f"
            after = _reference_bits.new_bits(code, before, chunk.coding[0], w, is_float)
            out[position * w : (position + 1) * w] = after.to_bytes(w, "little")
            digests[0].update(before.to_bytes(w, "little"))
            digests[1].update(after.to_bytes(w, "little"))
        touched = b"".join(digest.digest()[:8] for digest in digests)
        valid = chunk.touched in (None, touched)
        check(valid, "corrupt", f"touched digests of {row.name!r:.40}")
    valid = row.target_digest in (None, blake3(out).digest()[:16])
    check(valid, "corrupt", f"target digest of {row.name!r:.40}")
    return bytes(out)


def match_base(delta: Delta, base: Base) -> dict[int, Tensor]:
    """Return the base tensor of each row that has one, by number of the row (§10).

    Raises:
        Refused: the base is not the delta's base.
    """
    found, right = {}, {}
    missing, wrong = [], []
    for i, row in enumerate(delta.rows):
        tensor = base.find(row) if row.base_file is not None else None
        right[i] = row.base_file is None
        if tensor:
            found[i] = tensor
            right[i] = tensor.digest() == row.base_digest
        elif row.base_file is not None:
            missing.append(("structure_mismatch", f"tensor {row.base_name!r:.60}"))
        if tensor and not right[i]:
            wrong.append(("base_mismatch", f"tensor {row.base_name!r:.60}"))
    for side in delta.side_files:
        if side.stored < 0:
            path = base.files.get(side.path)
            side.content = path.read_bytes() if path else b""
            same = blake3(side.content).digest() == side.digest
            if path is None or len(side.content) != side.n_bytes or not same:
                wrong.append(("base_mismatch", f"side file {side.path!r:.60}"))
    if missing or wrong:
        rebuilt = {i: row for i, row in enumerate(delta.rows) if not row.is_copied}
        done = set()
        for i, row in rebuilt.items():
            found_tensor = base.at(row.file, row.name, row.layout)
            if found_tensor and found_tensor.digest() == row.target_digest:
                done.add(i)
        code, what = (missing + wrong)[0]
        if done and all(i in done or right[i] for i in rebuilt):
            code = "already_applied" if len(done) == len(rebuilt) else "partly_applied"
        raise Refused(code, f"{what} is not the one that the delta was made from")
    return found


def apply(base: Path | str, delta: Path | str, out: Path | str) -> None:
    """Rebuild the target and write it to `out`, which must not exist (§10).

    Raises:
        FileExistsError: `out` exists.
        Refused: the delta breaks a rule, or the base is not its base.
    """
    read, out = decode(delta), Path(out)
    if os.path.lexists(out):
        raise FileExistsError(f"{out} exists")
    found = match_base(read, Base(Path(base)))
    data = {}
    for i, row in enumerate(read.rows):
        old = found[i].data if i in found else b""
        data[row.file, row.name] = target_bytes(row, old)
    contents = {side.path: side.content for side in read.side_files}
    for file in read.weight_files:
        tensors = b"".join(data[file.path, row.name] for row in file.rows)
        contents[file.path] = len(file.header).to_bytes(8, "little") + file.header + tensors

    partial = out.with_name(out.name + ".partial")
    try:
        if read.kind == "file":
            partial.write_bytes(contents[read.weight_files[0].path])
        else:
            for path in read.empty_folders + [os.path.dirname(path) for path in contents] + [""]:
                (partial / path).mkdir(parents=True, exist_ok=True)
            for path, content in contents.items():
                (partial / path).write_bytes(content)
        partial.rename(out)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)


def main(arguments: list[str]) -> int:
    """Run the script; return its exit status."""
    try:
        if len(arguments) == 1:
            for row in decode(arguments[0]).rows:
                nnz = sum(chunk.nnz for chunk in row.chunks)
                state = "copied" if row.is_copied else f"{nnz} touched"
                print(row.file, row.name, row.layout.dtype, row.layout.shape, state)
        elif len(arguments) == 3:
            apply(*arguments)
        else:
            print(__doc__, file=sys.stderr)
            return 2
    except (Refused, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
