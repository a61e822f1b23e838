"""The container of a delta (FORMAT §2): a safetensors file that holds a manifest and a payload.

Only this module reads and writes the container. Its header must be exactly as specified, byte for
byte, so no general JSON parser is needed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator

from blake3 import blake3

from sparsedelta._typing import AnyPath
from sparsedelta.errors import BadMagic, Corrupt, LimitExceeded, Truncated, UnsupportedVersion
from sparsedelta.format.manifest import (
    MAX_MANIFEST_BYTES,
    Manifest,
    parse_manifest,
    render_manifest,
)
from sparsedelta.format.records import Payload
from sparsedelta.fs import staged_output
from sparsedelta.stores.base import ByteSource

FORMAT_VERSION = 1
MAX_HEADER_BYTES = 1024
START_BYTES = 64  # of a file, in which its format is named
_LENGTH_BYTES = 8
_ALIGNMENT = 8
_BLOCK_BYTES = 1 << 20
_HEADER = (
    '{{"__metadata__":{{"format":"sparsedelta","format_version":"{version}","manifest_digest":'
    '"{digest}"}},"manifest":{{"dtype":"U8","shape":[{m}],"data_offsets":[0,{m}]}},"payload":'
    '{{"dtype":"U8","shape":[{p}],"data_offsets":[{m},{end}]}}}}'
)
_FIELDS = re.compile(
    rb'\{"__metadata__":\{"format":"sparsedelta","format_version":"(?P<version>[^"]*)"'
    rb'(?:,"manifest_digest":"(?P<digest>[0-9a-f]{64})"\},"manifest":\{"dtype":"U8","shape":'
    rb'\[(?P<m>[0-9]{1,18})\].*"payload":\{"dtype":"U8","shape":\[(?P<p>[0-9]{1,18})\].*)?',
    re.DOTALL,
)


def begins_as_delta(start: bytes) -> bool:
    """Return whether the first ``START_BYTES`` bytes of a file look like those of a delta."""
    return b'"format":"sparsedelta"' in start


def is_delta_file(path: AnyPath) -> bool:
    """Return whether there is a regular file at ``path`` that begins as a delta does."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return begins_as_delta(file.read(START_BYTES))


class FilePayload:
    """The payload of an open ``.sd`` file (``sparsedelta.format.records.Payload``).

    Attributes:
        name: name of the file, for messages.
        file_bytes: size of the file.
        manifest_bytes: size of its manifest; 0 before ``open``.
        any_size: whether ``Delta.check_output`` accepts an output of any size.
    """

    def __init__(self, source: ByteSource, *, any_size: bool = False) -> None:
        self.name = source.name
        self.file_bytes = source.n_bytes
        self.manifest_bytes = 0
        self.any_size = any_size
        self._source = source
        self._start = 0

    def read(self, offset: int, n_bytes: int) -> bytes:
        """Return ``n_bytes`` bytes of the payload from ``offset``.

        Raises:
            Truncated: the file ends before them.
        """
        return self._read_at(self._start + offset, n_bytes)

    def close(self) -> None:
        """Close the file."""
        self._source.close()

    def open(self) -> Manifest:
        """Read and check the header and the manifest; return the manifest. Call it before ``read``.

        Raises:
            FormatError: the file breaks a rule of FORMAT §12.
        """
        digest, m, p = self._read_header()
        end = self._start + m + p
        if self.file_bytes < end:
            raise Truncated(
                f"'{self.name}' ends early: it has {self.file_bytes} bytes, expected {end}; copy or"
                " download it again"
            )
        if self.file_bytes > end:
            raise Corrupt(
                f"'{self.name}' has {self.file_bytes - end} bytes after its payload, expected none;"
                " copy or download it again"
            )
        raw = self._read_at(self._start, m)
        if blake3(raw).digest() != digest:
            raise Corrupt(
                f"'{self.name}' is damaged: its manifest does not match its digest; copy or download"
                " it again"
            )
        self.manifest_bytes = m
        self._start += m
        return parse_manifest(raw, p)

    def _read_header(self) -> tuple[bytes, int, int]:
        """Return the manifest's digest and the sizes of manifest and payload."""
        size = int.from_bytes(self._read_at(0, _LENGTH_BYTES), "little")
        if size > MAX_HEADER_BYTES:
            raise LimitExceeded(
                f"'{self.name}' is not a delta: it does not begin as an .sd file does"
            )
        raw = self._read_at(_LENGTH_BYTES, size)
        self._start = _LENGTH_BYTES + size
        found = _FIELDS.match(raw)
        if found is None:
            raise BadMagic(f"'{self.name}' is not a sparsedelta file")
        version = found["version"].decode("latin-1")
        if version != str(FORMAT_VERSION):
            raise UnsupportedVersion(
                f"'{self.name}' has format version {version[:20]}, but this release reads only"
                f" version {FORMAT_VERSION}; a newer sparsedelta may read it"
            )
        if found["digest"] is not None:
            digest, m, p = bytes.fromhex(found["digest"].decode()), int(found["m"]), int(found["p"])
            if raw == _render_header(digest, m, p):
                if m > MAX_MANIFEST_BYTES:
                    raise LimitExceeded(
                        f"'{self.name}' has a manifest of {m} bytes, the limit is {MAX_MANIFEST_BYTES}"
                    )
                return digest, m, p
        raise BadMagic(f"'{self.name}' is not a sparsedelta file: its header is not as specified")

    def _read_at(self, offset: int, n_bytes: int) -> bytes:
        parts = []
        while n_bytes:
            part = self._source.read(offset, n_bytes)
            if not part:
                ends = f"ends early, at byte {offset}" if offset else "is empty"
                raise Truncated(f"'{self.name}' {ends}; copy or download it again")
            parts.append(part)
            offset += len(part)
            n_bytes -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def write_container(
    manifest: Manifest, payload: Payload, path: AnyPath, *, overwrite: bool
) -> None:
    """Write a delta to ``path``, completely or not at all; see ``Delta.save``."""
    with staged_output(path, overwrite=overwrite) as staged, open(staged, "xb") as file:
        for block in container_blocks(manifest, payload):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())


def container_blocks(manifest: Manifest, payload: Payload) -> Iterator[bytes]:
    """Yield the bytes of a ``.sd`` file, in blocks and in order."""
    rendered = render_manifest(manifest)
    stored = _joined((one.offset, one.stored_bytes) for one in manifest.stored())
    n_payload = sum(size for _, size in stored)
    header = _render_header(blake3(rendered).digest(), len(rendered), n_payload)
    yield len(header).to_bytes(_LENGTH_BYTES, "little") + header + rendered
    for offset, size in stored:
        for at in range(offset, offset + size, _BLOCK_BYTES):
            yield payload.read(at, min(_BLOCK_BYTES, offset + size - at))


def _joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return ranges (offset, size); those that continue the one before are joined with it."""
    joined: list[tuple[int, int]] = []
    begin = end = 0
    for offset, size in ranges:
        if offset != end:
            joined.append((begin, end - begin))
            begin = end = offset
        end += size
    return [*joined, (begin, end - begin)]


def _render_header(digest: bytes, m: int, p: int) -> bytes:
    text = _HEADER.format(version=FORMAT_VERSION, digest=digest.hex(), m=m, p=p, end=m + p)
    raw = text.encode("ascii")
    return raw + b" " * (-len(raw) % _ALIGNMENT)
