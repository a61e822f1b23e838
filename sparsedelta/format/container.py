"""The ``.sd`` file (FORMAT §2): a safetensors file holding a manifest and coded entries.

Only this module knows the container. Reading believes nothing: sizes are capped before anything is
allocated, entries and manifest must agree exactly, and digests cover every byte.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence

from blake3 import blake3

from sparsedelta.codecs.zstd import compress_text, content_bytes, decompress
from sparsedelta.errors import BadMagic, Corrupt, LimitExceeded, Truncated, UnsupportedVersion
from sparsedelta.format.manifest import (
    FINGERPRINT_BYTES,
    MAX_MANIFEST_BYTES,
    Manifest,
    parse_manifest,
    render_manifest,
)
from sparsedelta.format.records import (
    MANIFEST_KEY,
    RESERVED_PREFIX,
    Payload,
    entry_keys,
    tensor_key,
)
from sparsedelta.format.safetensors_header import (
    MAX_HEADER_BYTES,
    MAX_NAME_BYTES,
    METADATA_KEY,
    Header,
    HeaderEntry,
    parse_header,
    render_header,
)
from sparsedelta.format.strict_json import NotJSON, hex_bytes
from sparsedelta.fs import staged_output
from sparsedelta.stores.base import ByteSource

FORMAT = "sparsedelta"
FORMAT_VERSION = 1
_LENGTH_BYTES = 8
_BLOCK_BYTES = 1 << 20
_LONGEST_KEY = len(tensor_key(RESERVED_PREFIX)) - len(RESERVED_PREFIX) + MAX_NAME_BYTES
_METADATA = ("format", "format_version", "manifest_digest")


class FilePayload:
    """The coded entries of an open ``.sd`` file (``sparsedelta.format.records.Payload``).

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

    def check_against(self, manifest: Manifest) -> None:
        """Check that there are exactly the entries, of the sizes, that the manifest calls for.

        Raises:
            Corrupt: there are not.
        """
        called_for = {MANIFEST_KEY, *entry_keys(manifest.target, manifest.tensors)}
        for key in self._entries.keys() ^ called_for:
            problem = "is not in the manifest" if key in self._entries else "is missing"
            raise Corrupt(f"'{self.name}': entry {key[:200]!r} {problem}")
        for row in manifest.tensors:
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
                f"'{self.name}' is not a delta: it states a header of {size} bytes, the limit is"
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


def payload_digest(keys: Sequence[str], payload: Payload) -> bytes:
    """Return the digest of the payload: of the entries ``keys``, in this order (FORMAT §2)."""
    hasher = blake3()
    for block in _payload_blocks(keys, payload):
        hasher.update(block)
    return hasher.digest()


def write_container(
    manifest: Manifest, payload: Payload, path: str | os.PathLike[str], *, overwrite: bool
) -> None:
    """Write a manifest and its payload as one file, whole or not at all; see ``Delta.save``."""
    keys = entry_keys(manifest.target, manifest.tensors)
    coded = compress_text(render_manifest(manifest))
    header = _render_container_header(coded, keys, payload)
    if len(header) > MAX_HEADER_BYTES:
        raise LimitExceeded(f"the delta's header has {len(header)} bytes, limit {MAX_HEADER_BYTES}")
    with staged_output(path, overwrite=overwrite) as staged, open(staged, "xb") as file:
        file.write(len(header).to_bytes(_LENGTH_BYTES, "little"))
        file.write(header)
        file.write(coded)
        for block in _payload_blocks(keys, payload):
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


def _payload_blocks(keys: Sequence[str], payload: Payload) -> Iterator[bytes]:
    for key in keys:
        n_bytes = payload.n_bytes(key)
        for offset in range(0, n_bytes, _BLOCK_BYTES):
            yield payload.read(key, offset, min(_BLOCK_BYTES, n_bytes - offset))


def _render_container_header(manifest: bytes, keys: Sequence[str], payload: Payload) -> bytes:
    sizes = {MANIFEST_KEY: len(manifest)}
    sizes |= {key: payload.n_bytes(key) for key in keys}
    entries, begin = [], 0
    for key, size in sizes.items():
        entries.append(HeaderEntry(key, "U8", (size,), begin, begin + size))
        begin += size
    values = (FORMAT, str(FORMAT_VERSION), blake3(manifest).hexdigest())
    return render_header(dict(zip(_METADATA, values, strict=True)), entries)
