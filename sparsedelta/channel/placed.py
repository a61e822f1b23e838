"""What a follower has written on disk: it is known again by its files, and they are checked when the follower starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from sparsedelta.channel.entry import Entry
from sparsedelta.format.paths import WEIGHT_SUFFIX
from sparsedelta.format.safetensors_header import MAX_HEADER_BYTES
from sparsedelta.format.strict_json import (
    MAX_INTEGER,
    compact_json,
    fixed_items,
    hex_bytes,
    integer,
    items,
    parse_json,
    text,
)

_WHAT = "the file of what is held"
_ONE_FILE = "."  # name of a version that is a single file
_DIGEST_BYTES = 32
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class PlacedFile:
    """A file of a version.

    Attributes:
        name: its path in the folder; ``_ONE_FILE`` if the version is a single file.
        inode: its number in the file system.
        time: when its content was changed last, in nanoseconds.
        digest: BLAKE3; for weight files, of the header, since the tensors have digests of their own.
    """

    name: str
    inode: int
    time: int
    digest: bytes

    def is_in(self, place: Path) -> bool:
        """Return whether it is there, not replaced and not changed."""
        try:
            return _marks(place / self.name) == (self.inode, self.time)
        except OSError:
            return False

    def is_whole(self, place: Path) -> bool:
        """Return whether a file with its digest is there."""
        try:
            return _digest(place / self.name, has_tensors=_has_tensors(self.name)) == self.digest
        except OSError:
            return False


@dataclass(frozen=True, slots=True)
class Placed:
    """A version that was written.

    Attributes:
        version: its number.
        digest: of its entry.
        files: its files.
    """

    version: int
    digest: bytes
    files: tuple[PlacedFile, ...] = ()

    def is_in(self, place: Path) -> bool:
        """Return whether it is there, perhaps damaged: one of its files is as it was written."""
        return any(file.is_in(place) for file in self.files)

    def damage(self, place: Path) -> str | None:
        """Return the name of a file that is missing or changed, tensors apart; None if there is none."""
        return next((file.name for file in self.files if not file.is_whole(place)), None)


def placed(entry: Entry, place: Path) -> Placed:
    """Describe a version that was just written to a folder or file."""
    files = (_file(path, place) for path in _files(place))
    return Placed(entry.version, entry.digest, tuple(files))


def placed_json(versions: Sequence[Placed]) -> bytes:
    """Return the content of the file that lists versions."""
    return compact_json(
        [
            [
                one.version,
                one.digest.hex(),
                [[f.name, f.inode, f.time, f.digest.hex()] for f in one.files],
            ]
            for one in versions
        ]
    )


def parse_placed(raw: bytes) -> list[Placed]:
    """Return the versions of ``placed_json``.

    Raises:
        FormatError: it is not from there.
    """
    return [
        Placed(integer(version, _WHAT), _hex(digest), tuple(map(_parse_file, items(files, _WHAT))))
        for version, digest, files in (
            fixed_items(one, _WHAT, 3) for one in items(parse_json(raw, _WHAT), _WHAT)
        )
    ]


def _parse_file(value: Any) -> PlacedFile:
    name, inode, time, digest = fixed_items(value, _WHAT, 4)
    return PlacedFile(
        text(name, _WHAT),
        integer(inode, _WHAT),
        integer(time, _WHAT),
        _hex(digest),
    )


def _hex(value: Any) -> bytes:
    return hex_bytes(value, _WHAT, _DIGEST_BYTES)


def _files(place: Path) -> Iterator[Path]:
    if place.is_file():
        yield place
    else:
        yield from sorted(path for path in place.rglob("*") if path.is_file())


def _file(path: Path, place: Path) -> PlacedFile:
    name = path.relative_to(place).as_posix()
    return PlacedFile(name, *_marks(path), _digest(path, has_tensors=_has_tensors(name)))


def _has_tensors(name: str) -> bool:
    return name == _ONE_FILE or name.endswith(WEIGHT_SUFFIX)


def _marks(path: Path) -> tuple[int, int]:
    """Return what tells a file from one that takes its place: its inode, and when it was changed."""
    found = path.stat()
    return found.st_ino & MAX_INTEGER, max(0, found.st_mtime_ns)


def _digest(path: Path, *, has_tensors: bool) -> bytes:
    """Return the digest of a file, or of its header if it has tensors."""
    hasher = blake3()
    with open(path, "rb", buffering=0) as file:
        if has_tensors:
            size = file.read(8)
            header = min(int.from_bytes(size, "little"), MAX_HEADER_BYTES)
            return hasher.update(size).update(file.read(header)).digest()
        while block := file.read(_BLOCK_BYTES):
            hasher.update(block)
    return hasher.digest()
