"""The record beside a delta in a repository: the base that ``push`` verified, and the hashes of its files.

With it, others can compare the base with the Hub's file list without downloading weights. Like all data of
the Hub it is only a hint: ``apply`` always verifies the base by digests.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from sparsedelta.errors import Corrupt
from sparsedelta.format.paths import DELTA_SUFFIX, path_problem
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

RECORD_SUFFIX = ".base.json"
MAX_RECORD_BYTES = 4 << 20
_MEMBERS = ("base", "fingerprint", "files")
_FILE_MEMBERS = ("path", "n_bytes", "sha256", "git_oid")
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class BaseRecord:
    """The base that ``push`` verified.

    Attributes:
        base: reference of its repository, pinned to a commit.
        fingerprint: hex fingerprint of the tensors that the delta was made from.
        files: the files of the base that the delta needs, with the hashes that the Hub states.
    """

    base: str
    fingerprint: str
    files: tuple[RemoteFile, ...]


def record_path(delta_path: str) -> str:
    """Return the path of a delta's record in the repository."""
    return delta_path.removesuffix(DELTA_SUFFIX) + RECORD_SUFFIX


def render_record(record: BaseRecord) -> bytes:
    """Return a record as JSON."""
    files = tuple(sorted(record.files, key=lambda file: file.path))
    return (json.dumps(asdict(replace(record, files=files)), indent=2) + "\n").encode()


def parse_record(raw: bytes, what: str) -> BaseRecord:
    """Return the record that a file contains.

    Args:
        raw: content of the file.
        what: what error messages call the file.

    Raises:
        FormatError: the content is not a valid record.
    """
    base, fingerprint, files = members(parse_json(raw, what), what, _MEMBERS)
    return BaseRecord(
        text(base, f"base of {what}"),
        hex_bytes(fingerprint, f"fingerprint of {what}", 32).hex(),
        tuple(_parse_file(file, what) for file in items(files, f"files of {what}")),
    )


def differences(expected: BaseRecord, files: Mapping[str, RemoteFile]) -> list[str]:
    """Return the paths of a record's files that a repository lacks or has with other content."""
    return [file.path for file in expected.files if files.get(file.path) != file]


def is_content(file: RemoteFile, local_path: Path) -> bool:
    """Return whether a file on disk has the size and the hash that the Hub states for a file."""
    n_bytes = local_path.stat().st_size
    if n_bytes != file.n_bytes:
        return False
    if file.sha256 is not None:
        return _digest(local_path, hashlib.sha256()) == file.sha256
    return git_oid(local_path) == file.git_oid


def git_oid(local_path: Path) -> str:
    """Return the object id, hex, that git gives to a file on disk."""
    return _digest(local_path, hashlib.sha1(b"blob %d\0" % local_path.stat().st_size))


def _digest(local_path: Path, hasher: hashlib._Hash) -> str:
    with local_path.open("rb") as file:
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
