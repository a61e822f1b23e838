"""The record beside a delta in a repository: which files of the base's repository were proved to be its base.

It lets others compare the base with what the Hub says of it, without a download. It is a hint like all
that comes from the Hub: ``apply`` proves the base by digests in any case.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from sparsedelta.errors import Corrupt
from sparsedelta.format.paths import path_problem
from sparsedelta.format.strict_json import (
    hex_bytes,
    integer,
    items,
    members,
    optional,
    parse_json,
    text,
)
from sparsedelta.hub.client import RemoteFile
from sparsedelta.hub.references import DELTA_SUFFIX

RECORD_SUFFIX = ".base.json"
MAX_RECORD_BYTES = 4 << 20
_MEMBERS = ("base", "fingerprint", "files")
_FILE_MEMBERS = ("path", "n_bytes", "sha256", "git_oid")
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class BaseRecord:
    """What was proved of a base when a delta was pushed.

    Attributes:
        base: reference of its repository, pinned.
        fingerprint: of the tensors that the delta is made from, hex.
        files: those of the base that the delta needs, as the Hub described them.
    """

    base: str
    fingerprint: str
    files: tuple[RemoteFile, ...]


def record_path(delta_path: str) -> str:
    """Return the path of the record that belongs to a delta in a repository."""
    return delta_path.removesuffix(DELTA_SUFFIX) + RECORD_SUFFIX


def render_record(record: BaseRecord) -> bytes:
    """Return a record as JSON."""
    files = tuple(sorted(record.files, key=lambda file: file.path))
    return (json.dumps(asdict(replace(record, files=files)), indent=2) + "\n").encode()


def parse_record(raw: bytes, what: str) -> BaseRecord:
    """Return the record in a file's content.

    Raises:
        FormatError: it is none.
    """
    base, fingerprint, files = members(parse_json(raw, what), what, _MEMBERS)
    return BaseRecord(
        text(base, f"base of {what}"),
        hex_bytes(fingerprint, f"fingerprint of {what}", 32).hex(),
        tuple(_parse_file(file, what) for file in items(files, f"files of {what}")),
    )


def differences(expected: BaseRecord, files: Mapping[str, RemoteFile]) -> list[str]:
    """Return the paths of a record's files that a repository has not, or has with other content."""
    return [file.path for file in expected.files if files.get(file.path) != file]


def is_content(file: RemoteFile, place: Path) -> bool:
    """Return whether a file on disk has the content that the Hub describes."""
    n_bytes = place.stat().st_size
    if n_bytes != file.n_bytes:
        return False
    if file.sha256 is not None:
        return _digest(place, hashlib.sha256()) == file.sha256
    return git_oid(place) == file.git_oid


def git_oid(place: Path) -> str:
    """Return git's name of a file on disk."""
    return _digest(place, hashlib.sha1(b"blob %d\0" % place.stat().st_size))


def _digest(place: Path, hasher: hashlib._Hash) -> str:
    with place.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            hasher.update(block)
    return hasher.hexdigest()


def _parse_file(value: object, what: str) -> RemoteFile:
    path, n_bytes, sha256, oid = members(value, f"a file of {what}", _FILE_MEMBERS)
    name = text(path, f"a path in {what}")
    problem = path_problem(name)
    if problem:
        raise Corrupt(f"path {name[:200]!r} in {what} {problem}")
    return RemoteFile(
        name,
        integer(n_bytes, f"n_bytes in {what}"),
        optional(sha256, f"sha256 in {what}", lambda v, w: hex_bytes(v, w, 32).hex()),
        optional(oid, f"git_oid in {what}", lambda v, w: hex_bytes(v, w, 20).hex()),
    )
