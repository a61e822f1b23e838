"""Invalid vectors of the file, FORMAT §12: R1 to R4, R6 and R12 of the header and the manifest."""

from __future__ import annotations

from collections.abc import Callable

from blake3 import blake3

from vector_source.checkpoints import WEIGHTS, WeightFile, noise
from vector_source.samples import (
    CONFIG,
    plain,
    sample,
    with_header_text,
    with_manifest,
    with_side_file,
)
from vector_source.vectors import Invalid
from vector_source.writer import assemble, container_header


def truncated() -> list[Invalid]:
    """Return R1: files that end early."""
    whole = assemble(plain())
    start = 8 + int.from_bytes(whole[:8], "little")

    def cut(name: str, why: str, data: bytes) -> Invalid:
        return Invalid("truncated_" + name, why, "R1", "truncated", data)

    longer = (293).to_bytes(8, "little") + whole[8:300]
    return [
        cut("empty", "an empty file", b""),
        cut("length", "seven bytes", whole[:7]),
        cut("at_length", "eight bytes", whole[:8]),
        cut("header", "the file ends within the header", whole[: start // 2]),
        cut("at_header", "the file ends with the header", whole[:start]),
        cut("manifest", "the file ends within the manifest", whole[: start + 99]),
        cut("by_one", "the last byte is missing", whole[:-1]),
        cut("before", "the header is one byte longer than the file", longer),
    ]


def magic() -> list[Invalid]:
    """Return R2: what is not a delta, or of another version."""
    out = []

    def bad(name: str, why: str, data: bytes) -> None:
        out.append(Invalid("magic_" + name, why, "R2", "bad_magic", data))

    def spelled(name: str, why: str, old: str, new: str) -> None:
        bad(name, why, with_header_text(old.encode(), new.encode()))

    def header(name: str, why: str, change: Callable[[bytes], bytes]) -> None:
        def changed(text: bytes) -> bytes:
            if not text.endswith(b"    "):
                raise ValueError("the header ends with less than four spaces")
            return change(text)

        bad(name, why, assemble(with_side_file(content=bytes(range(200))), header=changed))

    bad("none", "a header of length 0", bytes(8))
    header("empty", "a header of spaces", lambda text: b" " * 8)
    header("text", "the header is not JSON", lambda text: text.replace(b"}}", b"} "))
    header("mark", "a byte order mark before the object", lambda text: b"\xef\xbb\xbf" + text[:-3])
    header("before", "a space before the object", lambda text: b" " + text[:-1])
    header("tab", "padded with tabs", lambda text: text.replace(b" ", b"\t"))
    header("zero", "padded with zero bytes", lambda text: text.replace(b" ", b"\0"))
    header("more_spaces", "eight spaces too many", lambda text: text + b" " * 8)
    header("less_spaces", "a length that is not a multiple of 8", lambda text: text[:-1])
    header("no_spaces", "no padding", lambda text: text.rstrip())
    weights = WeightFile(WEIGHTS, {"w": noise("U8", 4, 1)}, {"format": "pt"})
    bad("safetensors", "a safetensors file of weights", weights.content())
    weights.metadata = None
    bad("no_metadata", "a safetensors file without metadata", weights.content())
    moved = (
        '{"format":"sparsedelta","format_version":"1"',
        '{"format_version":"1","format":"sparsedelta"',
    )
    for name, why, old, new in (
        ("space", "a space between tokens", '"payload":{', '"payload": {'),
        ("format_case", "format is Sparsedelta", '"sparsedelta"', '"Sparsedelta"'),
        ("format_missing", "no format", '"format":"sparsedelta",', ""),
        ("version_missing", "no format_version", '"format_version":"1",', ""),
        (
            "version_number",
            "format_version is a number",
            '"format_version":"1"',
            '"format_version":1',
        ),
        ("escape", "an escape in a key", '"format_version"', '"format\\u005fversion"'),
        ("metadata_more", "one more member of the metadata", '"format":', '"a":"b","format":'),
        ("entry_more", "one more entry", '{"__metadata__"', '{"a":1,"__metadata__"'),
        ("member_more", "one more member of an entry", '"manifest":{', '"manifest":{"a":1,'),
        ("order", "a member moved", *moved),
        ("twice", "a member twice", '"format":"sparsedelta",', '"format":"sparsedelta",' * 2),
        ("payload_name", "another name of the payload", '"payload"', '"payloads"'),
        ("offset", "the manifest begins at 1", '"data_offsets":[0,', '"data_offsets":[1,'),
        (
            "zero_padded",
            "an integer with a leading zero",
            '"data_offsets":[0,',
            '"data_offsets":[00,',
        ),
        ("newline", "a line end after the object", "}}", "}}\n"),
    ):
        spelled(name, why, old, new)
    whole = assemble(plain())
    start = 8 + int.from_bytes(whole[:8], "little")
    text = whole[8:start].decode()
    digest = text[text.index("_digest") + 10 :][:64]
    spelled("digest_upper", "the digest in capitals", digest, digest.upper())
    spelled("digest_short", "a digest of 31 bytes", digest, digest[:-2])
    spelled("digest_letter", "a digest that is not hex", digest, "g" + digest[1:])
    m = text[text.index("[") + 1 : text.index("]")]
    p = len(whole) - start - int(m)
    spelled("shape_zero", "a size with a leading zero", f'"shape":[{m}]', f'"shape":[0{m}]')
    spelled("shape_float", "a size with a fraction", f'"shape":[{m}]', f'"shape":[{m}.0]')
    spelled("shape_payload", "a shape unlike the offsets", f'"shape":[{p}]', f'"shape":[{p + 1}]')
    spelled("hole", "a byte between manifest and payload", f"[{m},", f"[{int(m) + 1},")
    spelled("dtype", "an entry is I8", f'"U8","shape":[{m}]', f'"I8","shape":[{m}]')
    spelled("dimensions", "two dimensions", f'"shape":[{m}]', f'"shape":[1,{m}]')
    for name, version in (("2", "2"), ("0", "0"), ("10", "10"), ("padded", "01"), ("point", "1.0")):
        why = f"format_version is {version}"
        data = with_header_text(b'"1"', f'"{version}"'.encode())
        out.append(Invalid(f"version_{name}", why, "R2", "unsupported_version", data))
    return out


def sizes() -> list[Invalid]:
    """Return R3, R4 and R6: sizes of the file and the manifest, and the manifest's digest."""
    out = []

    def add(name: str, why: str, breaks: str, data: bytes) -> None:
        out.append(Invalid(name, why, breaks, "corrupt", data))

    add("trailing", "a byte after the payload", "R3", assemble(plain(), whole=lambda d: d + b"\0"))
    add("trailing_twice", "the file twice", "R3", assemble(plain(), whole=lambda d: d * 2))

    def other(header: bytes) -> bytes:
        at = header.index(b"_digest") + 10
        return header[:at] + blake3(b"").hexdigest().encode() + header[at + 64 :]

    add("manifest_digest", "manifest_digest is wrong", "R4", assemble(plain(), header=other))

    def last(data: bytes) -> bytes:
        delta = with_side_file()
        n = len(b"".join(delta.entries.values()))
        return data[: -n - 1] + bytes([data[-n - 1] ^ 1]) + data[-n:]

    data = assemble(with_side_file(), whole=last)
    add("manifest_changed", "a bit of the manifest is changed", "R4", data)

    def manifest(name: str, why: str, change: Callable[[bytes], bytes]) -> None:
        add("manifest_" + name, why, "R6", assemble(plain(), manifest=change))

    manifest("empty", "a manifest of 0 bytes", lambda data: b"")
    manifest("short", "a manifest of 15 bytes", lambda data: data[:15])
    manifest("only_sizes", "a manifest that ends after its sizes", lambda data: data[:16])
    manifest("half", "a manifest that ends within the structure", lambda data: data[:100])
    manifest("no_digests", "a manifest without digests", lambda data: data[: -16 * 5])
    manifest("digest_less", "a digest too few", lambda data: data[:-16])
    manifest("digest_more", "a digest too many", lambda data: data + bytes(16))
    manifest("byte_less", "a byte too few", lambda data: data[:-1])
    manifest("byte_more", "a byte too many", lambda data: data + b"\0")
    delta = sample()
    delta.digests["side_files"][0] = delta.digests["side_files"][0][:16]
    add("manifest_side_digest", "a digest of 16 bytes for a side file", "R6", assemble(delta))
    delta = sample(known=False)
    delta.digests["target"].append(bytes(16))
    add("manifest_target_digest", "a target digest where none is due", "R6", assemble(delta))
    for name, by in (("more", b"\0"), ("twice", b'{"a": 1}\n')):
        delta = with_side_file()
        delta.entries["more"] = by
        why = f"a payload with {len(by)} bytes too many"
        add("payload_" + name, why, "R6", assemble(delta))
    delta = with_side_file()
    delta.entries[CONFIG] = b'{"a": 1}'
    add("payload_less", "a payload with a byte too few", "R6", assemble(delta))
    delta = plain()
    delta.entries["chunk:0:2"] += b"\0"
    add("payload_streams", "streams with a byte too many", "R6", assemble(delta))
    delta = plain()
    del delta.entries["chunk:0:1"]
    add("payload_stream", "a stream is missing", "R6", assemble(delta))
    carried = {"target.side_files.1.2": 5}
    add("payload_side", "a side file that is not there", "R6", with_manifest(carried))
    return out


def container_limits() -> list[Invalid]:
    """Return R12 of the file's header and of the manifest's size."""
    whole = assemble(plain())
    start = 8 + int.from_bytes(whole[:8], "little")
    most = ((1 << 64) - 1).to_bytes(8, "little") + whole[8:]
    long = (1032).to_bytes(8, "little") + whole[8:start].ljust(1032) + whole[start:]
    limit = "limit_exceeded"
    out = [
        Invalid("limit_header", "a header of 1032 bytes", "R12", limit, long, also=("bad_magic",)),
        Invalid(
            "limit_header_most",
            "a header of 2^64 - 1 bytes",
            "R12",
            limit,
            most,
            also=("truncated", "bad_magic"),
        ),
    ]
    for name, size in (("", (1 << 27) + 1), ("_most", 10**300)):
        header = container_header(whole[start:], 0, size)
        data = len(header).to_bytes(8, "little") + header + whole[start:]
        why = f"a manifest of {size if size < 1 << 30 else '10^300'} bytes"
        also = ("truncated",)
        out.append(Invalid("limit_manifest" + name, why, "R12", limit, data, also=also))
    return out
