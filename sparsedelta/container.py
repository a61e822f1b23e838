"""The ``.sd`` file (FORMAT §2): a safetensors file holding a manifest and coded entries.

Only this module knows the container. Reading believes nothing: sizes are capped before anything is
allocated, entries and manifest must agree exactly, and digests cover every byte.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from blake3 import blake3

from sparsedelta.codecs.zstd import compress_text, content_bytes, decompress
from sparsedelta.delta import (
    MANIFEST_KEY,
    RESERVED_PREFIX,
    Delta,
    entry_keys,
    tensor_key,
)
from sparsedelta.errors import BadMagic, Corrupt, LimitExceeded, Truncated, UnsupportedVersion
from sparsedelta.headers import (
    MAX_HEADER_BYTES,
    MAX_NAME_BYTES,
    METADATA_KEY,
    Header,
    HeaderEntry,
    parse_header,
    render_header,
)
from sparsedelta.manifest import (
    FINGERPRINT_BYTES,
    MAX_MANIFEST_BYTES,
    Manifest,
    parse_manifest,
    render_manifest,
)
from sparsedelta.regular import open_regular
from sparsedelta.staging import check_no_folder, staged_output
from sparsedelta.strictjson import NotJSON, hex_bytes

FORMAT = "sparsedelta"
FORMAT_VERSION = 1
_LENGTH_BYTES = 8
_BLOCK_BYTES = 1 << 20
_LONGEST_KEY = len(tensor_key(RESERVED_PREFIX)) - len(RESERVED_PREFIX) + MAX_NAME_BYTES
_METADATA = ("format", "format_version", "manifest_digest")


class ByteSource(Protocol):
    """Where the bytes of a ``.sd`` file come from. Safe for reading from several threads.

    Attributes:
        name: what messages call the file.
        n_bytes: its size.
    """

    name: str
    n_bytes: int

    def read(self, offset: int, n_bytes: int) -> bytes:
        """Return up to ``n_bytes`` bytes from ``offset``, none at the end."""

    def close(self) -> None:
        """Release what is held open."""


class OpenFile:
    """The bytes of a file on disk (``ByteSource``)."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = os.fsdecode(path)
        self._fd = open_regular(path)
        self.n_bytes = os.fstat(self._fd).st_size

    def read(self, offset: int, n_bytes: int) -> bytes:
        """Return up to ``n_bytes`` bytes from ``offset``, none at the end."""
        if self._fd < 0:
            raise ValueError(f"'{self.name}' is closed; load the delta again")
        return os.pread(self._fd, n_bytes, offset)

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            self.close()


class FilePayload:
    """The coded entries of an open ``.sd`` file (``sparsedelta.delta.Payload``).

    Attributes:
        name: what messages call the file.
        file_bytes: its size.
        manifest_bytes: the stored size of its manifest.
    """

    def __init__(self, source: ByteSource) -> None:
        self.name = source.name
        self.file_bytes = source.n_bytes
        self.manifest_bytes = 0
        self._source = source
        self._data_offset = 0
        self._entries: dict[str, tuple[int, int]] = {}
        self._digest: bytes | None = None
        self._checked = False
        self._lock = threading.Lock()

    def n_bytes(self, key: str) -> int:
        """Return the size of an entry, 0 if there is none."""
        begin, end = self._entries.get(key, (0, 0))
        return end - begin

    def read(self, key: str, offset: int, n_bytes: int) -> bytes:
        """Return ``n_bytes`` bytes of an entry from ``offset``; raises Truncated if they are gone."""
        return self._read_at(self._data_offset + self._entries[key][0] + offset, n_bytes)

    def check(self) -> None:
        """Compare the payload with its digest, the first time this is called.

        Raises:
            Corrupt: they differ.
        """
        with self._lock:
            if self._checked:
                return
            hasher = blake3()
            offset = self._data_offset + self.manifest_bytes
            while offset < self.file_bytes:
                block = self._read_at(offset, min(_BLOCK_BYTES, self.file_bytes - offset))
                hasher.update(block)
                offset += len(block)
            if hasher.digest() != self._digest:
                raise Corrupt(f"'{self.name}' is damaged: its payload does not match its digest")
            self._checked = True

    def close(self) -> None:
        """Close the file."""
        self._source.close()

    def open(self) -> Manifest:
        """Read and check header and manifest; afterwards entries can be read.

        Raises:
            FormatError: the file breaks a rule of FORMAT §12.
        """
        header = self._read_header()
        digest = self._check_metadata(header.metadata)
        self._check_entries(header)
        manifest = self._read_manifest(digest)
        self._digest = manifest.payload_digest
        return manifest

    def check_against(self, delta: Delta) -> None:
        """Check that there are exactly the entries, of the sizes, that the manifest calls for.

        Raises:
            Corrupt: there are not.
        """
        called_for = {MANIFEST_KEY, *entry_keys(delta)}
        for key in self._entries.keys() ^ called_for:
            problem = "is not in the manifest" if key in self._entries else "is missing"
            raise Corrupt(f"'{self.name}': entry {key[:200]!r} {problem}")
        for row in delta.tensors:
            if row.change:
                expected = row.change.coded_bytes
                found = self.n_bytes(tensor_key(row.name))
                if found != expected:
                    raise Corrupt(
                        f"tensor {row.name!r}: entry of {found} bytes, its chunks add up to {expected}"
                    )

    def _read_header(self) -> Header:
        size = int.from_bytes(self._read_at(0, _LENGTH_BYTES), "little")
        if size > MAX_HEADER_BYTES:
            raise LimitExceeded(
                f"'{self.name}' is no delta: it states a header of {size} bytes, the limit is"
                f" {MAX_HEADER_BYTES}"
            )
        raw = self._read_at(_LENGTH_BYTES, size)
        self._data_offset = _LENGTH_BYTES + size
        try:
            return parse_header(raw, f"'{self.name}'", longest_name=_LONGEST_KEY)
        except NotJSON as error:
            raise BadMagic(f"'{self.name}' is not a delta: {error}") from error

    def _check_metadata(self, metadata: dict[str, str] | None) -> bytes:
        if metadata is None or metadata.get("format") != FORMAT:
            raise BadMagic(
                f"'{self.name}' is not a delta: its header does not say format {FORMAT!r}"
            )
        version = metadata.get("format_version")
        if version is not None and version != str(FORMAT_VERSION):
            raise UnsupportedVersion(
                f"'{self.name}' has format version {version[:40]!r}, this release reads"
                f" {FORMAT_VERSION}; a newer sparsedelta may read it"
            )
        if sorted(metadata) != sorted(_METADATA):
            found = ", ".join(repr(name[:40]) for name in sorted(metadata)[:5])
            raise Corrupt(
                f"{METADATA_KEY} of '{self.name}' has the members {found}, expected"
                f" {', '.join(map(repr, sorted(_METADATA)))}"
            )
        return hex_bytes(metadata["manifest_digest"], "manifest_digest", FINGERPRINT_BYTES)

    def _check_entries(self, header: Header) -> None:
        if not header.only_known_members:
            raise Corrupt(
                f"'{self.name}': an entry has other members than dtype, shape, data_offsets"
            )
        end = 0
        for entry in header.entries:
            if (
                entry.dtype != "U8"
                or entry.shape != (entry.end - entry.begin,)
                or not entry.shape[0]
            ):
                raise Corrupt(f"'{self.name}': entry {entry.name[:200]!r} is not a row of bytes")
            if entry.begin != end:
                raise Corrupt(
                    f"'{self.name}': entry {entry.name[:200]!r} overlaps or leaves a hole"
                )
            end = entry.end
        found = self.file_bytes - self._data_offset
        if end > found:
            raise Truncated(
                f"'{self.name}' ends early: {found} bytes of data, its header says {end};"
                " copy or download it again"
            )
        if end < found:
            raise Corrupt(f"'{self.name}' has {found - end} bytes after its last entry")
        if not header.entries or header.entries[0].name != MANIFEST_KEY:
            raise Corrupt(f"'{self.name}' does not begin with a manifest")
        self._entries = {entry.name: (entry.begin, entry.end) for entry in header.entries}
        self.manifest_bytes = header.entries[0].end

    def _read_manifest(self, digest: bytes) -> Manifest:
        if self.manifest_bytes > MAX_MANIFEST_BYTES:
            raise LimitExceeded(f"'{self.name}' has a manifest of {self.manifest_bytes} bytes")
        coded = self._read_at(self._data_offset, self.manifest_bytes)
        if blake3(coded).digest() != digest:
            raise Corrupt(f"'{self.name}' is damaged: its manifest does not match its digest")
        return parse_manifest(decompress_text(coded, "the manifest"))

    def _read_at(self, offset: int, n_bytes: int) -> bytes:
        parts = []
        while n_bytes:
            part = self._source.read(offset, n_bytes)
            if not part:
                raise Truncated(
                    f"'{self.name}' ends early, at byte {offset}; copy or download it again"
                )
            parts.append(part)
            offset += len(part)
            n_bytes -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def load(path: str | os.PathLike[str]) -> Delta:
    """Return the delta in a ``.sd`` file: header and manifest read and checked, the payload on demand.

    The file stays open until ``Delta.close``; the payload is compared with its digest before it is
    first used.

    Raises:
        FormatError: the file is not a delta this version can read.
        OSError: it cannot be opened.
    """
    return read_delta(OpenFile(path))


def read_delta(source: ByteSource) -> Delta:
    """Return the delta whose file has these bytes; see ``load``. The source is closed with it."""
    payload = FilePayload(source)
    try:
        manifest = payload.open()
        delta = Delta(manifest.base, manifest.target, manifest.tensors, manifest.info, payload)
        payload.check_against(delta)
    except BaseException:
        payload.close()
        raise
    return delta


def write_delta(delta: Delta, path: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Write a delta as one file, whole or not at all; see ``Delta.save``."""
    check_no_folder(Path(path))
    delta.payload.check()
    hasher = blake3()
    for block in _payload_blocks(delta):
        hasher.update(block)
    manifest = compress_text(render_manifest(delta, hasher.digest()))
    header = _render_container_header(delta, manifest)
    if len(header) > MAX_HEADER_BYTES:
        raise LimitExceeded(f"the delta's header has {len(header)} bytes, limit {MAX_HEADER_BYTES}")
    with staged_output(path, overwrite=overwrite) as staged, open(staged, "xb") as file:
        file.write(len(header).to_bytes(_LENGTH_BYTES, "little"))
        file.write(header)
        file.write(manifest)
        for block in _payload_blocks(delta):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())


def decompress_text(coded: bytes, what: str) -> bytes:
    """Return the content of the one frame of a manifest or stored header.

    Raises:
        Corrupt: it is not such a frame.
        LimitExceeded: its content is beyond the limit.
    """
    size = content_bytes(coded)
    if size > MAX_MANIFEST_BYTES:
        raise LimitExceeded(f"{what} has {size} bytes, the limit is {MAX_MANIFEST_BYTES}")
    return decompress(coded, size)


def _payload_blocks(delta: Delta) -> Iterator[bytes]:
    for key in entry_keys(delta):
        n_bytes = delta.payload.n_bytes(key)
        for offset in range(0, n_bytes, _BLOCK_BYTES):
            yield delta.payload.read(key, offset, min(_BLOCK_BYTES, n_bytes - offset))


def _render_container_header(delta: Delta, manifest: bytes) -> bytes:
    sizes = {MANIFEST_KEY: len(manifest)}
    sizes |= {key: delta.payload.n_bytes(key) for key in entry_keys(delta)}
    entries, begin = [], 0
    for key, size in sizes.items():
        entries.append(HeaderEntry(key, "U8", (size,), begin, begin + size))
        begin += size
    values = (FORMAT, str(FORMAT_VERSION), blake3(manifest).hexdigest())
    return render_header(dict(zip(_METADATA, values, strict=True)), entries)
