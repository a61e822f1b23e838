"""A second decoder of sparsedelta files, written from FORMAT.md alone: plain, short and slow.

It reads every byte of a delta under every rule of FORMAT §12 and applies it to a base. It holds
whole checkpoints in memory: it is for checking other decoders and for learning, not for daily use.

    python reference_decoder.py DELTA                  say what DELTA holds
    python reference_decoder.py BASE DELTA OUT         apply DELTA to BASE
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _reference_bits
import zstandard
from _reference_base import Tensors, fingerprint, prefixes, read_base
from _reference_json import Refused, check, hexadecimal, parse_json
from _reference_manifest import DTYPES, SPAN, Chunk, Delta, Row, WeightFile, read_manifest
from blake3 import blake3

__all__ = ["Refused", "apply", "decode"]
MANIFEST = "sparsedelta:manifest"
FILE, HEADER, TENSOR = "sparsedelta:file/", "sparsedelta:header/", "sparsedelta:tensor/"


def open_frame(data: bytes, size: int | None) -> bytes:
    """Return the content of one frame: of just `size` bytes, or of at most 2^27 if it is None."""
    try:
        check(data[:4] == b"\x28\xb5\x2f\xfd", "corrupt", "not a Zstandard frame")
        head = zstandard.get_frame_parameters(data)
        stated = head.content_size
        check(stated != zstandard.CONTENTSIZE_UNKNOWN, "corrupt", "frame without content size")
        if size is None:
            check(stated <= 1 << 27, "limit_exceeded", f"{stated} bytes before compression")
        else:
            check(stated == size, "corrupt", f"frame of {stated} bytes where {size} are due")
        check(head.dict_id == 0, "corrupt", "frame with a dictionary")
        check(head.window_size <= 1 << 27, "corrupt", "frame with a window above 2^27")
        reader = zstandard.ZstdDecompressor(max_window_size=1 << 27)
        content = reader.decompress(data, allow_extra_data=False)
        if stated == 0:  # the blocks of such a frame have not been looked at
            stream = reader.decompressobj()
            content = stream.decompress(data)
            check(stream.eof and not stream.unused_data, "corrupt", "not one frame of no bytes")
    except zstandard.ZstdError as error:
        raise Refused("corrupt", f"damaged frame: {error}") from error
    check(len(content) == stated, "corrupt", "frame ends early")
    return content


def positions(
    encoding: str, stream: bytes, nnz: int, length: int, keys: Sequence[int] | None
) -> array[int]:
    """Return the touched positions within a span of `length` (§6), of elements with these keys."""
    out = array("Q")
    if encoding == "exponent":
        out.extend(_reference_bits.exponent(stream, length, keys or ()))
    elif encoding == "rice":
        out.extend(_reference_bits.rice(stream, length))
    elif encoding == "tiles":
        out.extend(_reference_bits.tiles(stream, length))
    elif encoding == "all":
        out.extend(range(length))
    elif encoding == "bitmap":
        out.extend(p for p in range(8 * len(stream)) if stream[p // 8] >> p % 8 & 1)
    else:
        half = len(stream) // 2
        tokens: Sequence[int] = stream
        if encoding == "gap16":
            tokens = [a + 256 * b for a, b in zip(stream[:half], stream[half:], strict=True)]
        skip = 255 if encoding == "gap8" else 65535
        p = -1
        for token in tokens:
            if token == skip:
                p += skip
            else:
                p += token + 1
                out.append(p)
        check(tokens[-1] != skip, "corrupt", "the last gap token is a skip")
    check(len(out) == nnz, "corrupt", f"{len(out)} positions where {nnz} are due")
    check(out[-1] < length, "corrupt", "a position lies beyond its span")
    return out


def read_container(raw: bytes) -> tuple[dict[str, bytes], bytes]:
    """Return the entries, in data order, and the data section after the manifest (§2)."""
    check(len(raw) >= 8, "truncated", "shorter than the length of its header")
    n_header = int.from_bytes(raw[:8], "little")
    check(n_header <= 100_000_000, "limit_exceeded", f"a header of {n_header} bytes")
    check(8 + n_header <= len(raw), "truncated", "shorter than its header")
    text, data = raw[8 : 8 + n_header].rstrip(b" "), raw[8 + n_header :]
    fair = text[:1] == b"{" and text[-1:] == b"}"
    check(fair, "bad_magic", "the header is no JSON object with spaces after it")
    header = parse_json(text, "bad_magic")
    meta = header.pop("__metadata__", None)
    fair = type(meta) is dict and meta.get("format") == "sparsedelta"
    check(fair, "bad_magic", "not of the format sparsedelta")
    check(meta.get("format_version", "1") == "1", "unsupported_version", "not version 1")
    fair = meta.keys() == {"format", "format_version", "manifest_digest"}
    check(fair, "corrupt", "__metadata__ has other members")

    spans = []
    for key, entry in header.items():
        fair = type(entry) is dict and entry.keys() == {"dtype", "shape", "data_offsets"}
        check(fair and entry["dtype"] == "U8", "corrupt", f"entry {key!r:.40}")
        shape, offsets = entry["shape"], entry["data_offsets"]
        fair = type(shape) is type(offsets) is list and (len(shape), len(offsets)) == (1, 2)
        fair = fair and all(type(n) is int and n >= 0 for n in shape + offsets)
        fair = fair and offsets[1] - offsets[0] == shape[0] >= 1
        check(fair, "corrupt", f"shape or offsets of entry {key!r:.40}")
        spans.append((offsets[0], offsets[1], key))
    spans.sort()
    check(bool(spans) and spans[0][2] == MANIFEST, "corrupt", "the manifest is not first")
    check(max(end for _, end, _ in spans) <= len(data), "truncated", "shorter than its entries")
    ends = [0] + [end for _, end, _ in spans]
    check(
        [begin for begin, _, _ in spans] == ends[:-1], "corrupt", "entries overlap or leave a hole"
    )
    check(ends[-1] == len(data), "corrupt", "bytes follow the last entry")
    entries = {key: data[begin:end] for begin, end, key in spans}
    digest = hexadecimal(meta["manifest_digest"], 32)
    check(blake3(entries[MANIFEST]).digest() == digest, "corrupt", "manifest_digest is wrong")
    return entries, data[ends[1] :]


def entry_key(row: Row) -> str:
    """Return the key of a tensor's entry (§2)."""
    return TENSOR + row.name if row.name.startswith("sparsedelta:") else row.name


def open_chunk(chunk: Chunk, data: bytes) -> None:
    """Fill in the chunk's streams (§5)."""
    for size, n_bytes in zip(chunk.sizes, chunk.stream_bytes, strict=True):
        chunk.streams.append(open_frame(data[:size], n_bytes) if size else bytes(n_bytes))
        data = data[size:]


def decode_chunk(
    chunk: Chunk, width: int, keys: Sequence[int] | None
) -> tuple[array[int], Sequence[int]]:
    """Return positions and codes of a chunk, whose elements had these keys before the change."""
    index, *values = chunk.streams
    found = positions(chunk.encoding, index, chunk.nnz, chunk.length, keys)
    if chunk.packing == "planes":
        return found, [int.from_bytes(bytes(code), "little") for code in zip(*values, strict=True)]
    touched_keys = None if keys is None else [keys[position] for position in found]
    codes = _reference_bits.PACKINGS[chunk.packing](values, chunk.nnz, width, touched_keys)
    return found, codes


def check_header(file: WeightFile) -> None:
    """Refuse a stored header that disagrees with the rows of its file (§3.3).

    A row's name is the tensor's own name, or ends in a colon and that name: which of them the
    weight sets say, and so perhaps an index that only the base holds.
    """
    header = parse_json(file.header, "corrupt")
    check(type(header) is dict, "corrupt", f"stored header of {file.path}")
    header.pop("__metadata__", None)
    by_data: dict[tuple[str, str, str], list[str]] = {}
    for name, entry in header.items():
        fair = type(entry) is dict and entry.keys() >= {"dtype", "shape", "data_offsets"}
        check(fair, "corrupt", f"stored header of {file.path}")
        key = (str(entry["dtype"]), str(entry["shape"]), str(entry["data_offsets"]))
        by_data.setdefault(key, []).append(name)
    check(len(header) == len(file.rows), "corrupt", f"tensors in the header of {file.path}")
    begin = 0
    for row in file.rows:
        if row.target is not None:
            end = begin + row.target.n_bytes
            key = (row.target.dtype, str(row.target.shape), str([begin, end]))
            names = [n for n in by_data.get(key, []) if (":" + row.name).endswith(":" + n)]
            check(bool(names), "corrupt", f"{row.name!r:.40} in the header of {file.path}")
            by_data[key].remove(max(names, key=len))
            begin = end


def decode(path: Path | str) -> Delta:
    """Return a delta, every byte of it read and checked (§12).

    Raises:
        Refused: it breaks a rule.
    """
    entries, payload = read_container(Path(path).read_bytes())
    delta = read_manifest(open_frame(entries.pop(MANIFEST), None))
    check(blake3(payload).digest() == delta.payload_digest, "corrupt", "payload_digest is wrong")
    called_for = {FILE + file.path for file in delta.side_files if file.is_carried}
    called_for |= {HEADER + file.path for file in delta.weight_files if file.is_stored}
    sizes = {entry_key(row): sum(sum(c.sizes) for c in row.changes or ()) for row in delta.rows}
    called_for |= {key for key, size in sizes.items() if size}
    check(called_for == entries.keys(), "corrupt", "entries and manifest disagree")
    for side in delta.side_files:
        if side.is_carried:
            side.content = open_frame(entries[FILE + side.path], side.n_bytes)
            check(blake3(side.content).digest() == side.digest, "corrupt", f"digest of {side.path}")
    for weights in delta.weight_files:
        if weights.is_stored:
            weights.header = open_frame(entries[HEADER + weights.path], None)
            check_header(weights)
    for row in delta.rows:
        data = entries.get(entry_key(row), b"")
        check(len(data) == sizes[entry_key(row)], "corrupt", f"coded sizes of {row.name!r:.40}")
        for chunk in row.changes or ():
            open_chunk(chunk, data)
            data = data[sum(chunk.sizes) :]
            if row.target and not chunk.needs_base:
                decode_chunk(chunk, DTYPES[row.target.dtype][1], None)
    return delta


def check_base(delta: Delta, tensors: Tensors) -> None:
    """Refuse a base that is not the one the delta was made from (§10, steps 2 and 5)."""
    rows = [row for row in delta.rows if row.base is not None]
    structure = {row.name: (row.base.dtype, row.base.shape) for row in rows if row.base}
    found = {name: (dtype, shape) for name, (dtype, shape, _) in tensors.items()}
    check(structure == found, "structure_mismatch", "names, dtypes or shapes are not the base's")
    fair = all(row.base and len(tensors[row.name][2]) == row.base.n_bytes for row in rows)
    check(fair, "structure_mismatch", "sizes of tensors in the base")
    digests = {row.name: blake3(tensors[row.name][2]).digest()[:16] for row in rows}
    wrong = [row for row in rows if row.base and row.base.digest != digests[row.name]]
    if wrong:
        done = all(row.target and row.target.digest == digests[row.name] for row in wrong)
        due = [row for row in delta.rows if row.changes is not None or row.target is None]
        applied = "already_applied" if len(wrong) == len(due) else "partly_applied"
        code = applied if done else "base_mismatch"
        raise Refused(code, f"tensor {wrong[0].name!r:.60} is not the base's")
    found_fingerprint = fingerprint([(row.name, *tensors[row.name]) for row in rows])
    check(found_fingerprint == delta.base_fingerprint, "base_mismatch", "fingerprint of the base")


def new_bits(code: int, before: int, values: str, width: int, is_float: bool) -> int:
    """Return the bits that a code makes of the bits before (§7)."""
    if values == "target":
        return code
    top, half = (1 << 8 * width) - 1, 1 << 8 * width - 1

    def ordered(x: int) -> int:
        return x if not is_float else x + half if x < half else top - x

    d = code // 2 if code % 2 == 0 else -(code + 1) // 2
    y = (ordered(before) + d) & top
    return y if not is_float else y - half if y >= half else top - y


def make_tensor(row: Row, old: bytes) -> bytes:
    """Return the target's bytes of a tensor, given the base's (§4, §7)."""
    if row.target is None or row.changes is None:
        return old
    _, width, is_float = DTYPES[row.target.dtype]
    out = bytearray(row.target.n_bytes)
    out[: row.keep * width] = old[: row.keep * width]
    touched = blake3(), blake3()
    for chunk in row.changes:
        span = range(chunk.number * SPAN, chunk.number * SPAN + chunk.length)
        keys = None
        if chunk.needs_base:
            before_bits = (out[i * width : (i + 1) * width] for i in span)
            keys = [_reference_bits.key(int.from_bytes(b, "little"), width) for b in before_bits]
        for position, code in zip(*decode_chunk(chunk, width, keys), strict=True):
            begin = (chunk.number * SPAN + position) * width
            at = slice(begin, begin + width)
            touched[0].update(out[at])
            before = int.from_bytes(out[at], "little")
            out[at] = new_bits(code, before, row.values, width, is_float).to_bytes(width, "little")
            touched[1].update(out[at])
    found = [digest.digest()[:8] for digest in touched]
    check(row.touched in (None, found), "corrupt", f"touched digests of {row.name!r:.40}")
    digest = blake3(out).digest()[:16]
    check(row.target.digest in (None, digest), "corrupt", f"target digest of {row.name!r:.40}")
    return bytes(out)


def canonical_header(file: WeightFile, prefix: str) -> bytes:
    """Return the header of a weight file that is canonical (§3.3)."""
    header: dict[str, Any] = {} if file.metadata is None else {"__metadata__": file.metadata}
    begin = 0
    for row in file.rows:
        check(row.name.startswith(prefix), "corrupt", f"{row.name!r:.40} is not of {prefix!r}")
        if row.target is not None:
            end = begin + row.target.n_bytes
            entry = {"dtype": row.target.dtype, "shape": row.target.shape}
            header[row.name.removeprefix(prefix)] = entry | {"data_offsets": [begin, end]}
            begin = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def apply(base: Path | str, delta_path: Path | str, out: Path | str) -> None:
    """Write the target of a delta under the name `out`, which must be free.

    Raises:
        Refused: the delta breaks a rule, or the base is not its base.
    """
    delta, out = decode(delta_path), Path(out)
    if os.path.lexists(out):
        raise FileExistsError(f"{out} exists")
    tensors, base_files = read_base(Path(base), {row.name for row in delta.rows})
    contents: dict[str, bytes] = {}
    for side in delta.side_files:
        contents[side.path] = side.content
        if not side.is_carried:
            there = base_files.get(side.path)
            contents[side.path] = there.read_bytes() if there else b""
            found_digest = blake3(contents[side.path]).digest()
            same = (len(contents[side.path]), found_digest) == (side.n_bytes, side.digest)
            check(
                there is not None and same,
                "base_mismatch",
                f"side file {side.path} is not the base's",
            )
    check_base(delta, tensors)

    made: Tensors = {}
    for row in delta.rows:
        if row.target is not None:
            old = tensors[row.name][2] if row.base else b""
            made[row.name] = (row.target.dtype, row.target.shape, make_tensor(row, old))
    found = fingerprint((name, *tensor) for name, tensor in made.items())
    check(delta.target_fingerprint in (None, found), "corrupt", "fingerprint of the target")
    paths = [file.path for file in delta.weight_files]
    prefix = prefixes(paths + list(contents), contents.__getitem__)
    for file in delta.weight_files:
        own = "" if delta.kind == "file" else prefix[file.path]
        header = file.header if file.is_stored else canonical_header(file, own)
        data = b"".join(made[row.name][2] for row in file.rows)
        contents[file.path] = len(header).to_bytes(8, "little") + header + data

    partial = out.with_name(out.name + ".partial")
    try:
        if delta.kind == "file":
            partial.write_bytes(contents[paths[0]])
        else:
            for path in delta.empty_folders + [os.path.dirname(path) for path in contents]:
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
                nnz = sum(chunk.nnz for chunk in row.changes or ())
                state = "removed" if row.target is None else f"{nnz} touched of"
                shown = row.target or row.base
                print(row.name, state, *((shown.dtype, shown.shape) if shown else ()))
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
