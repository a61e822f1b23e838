"""The proof that a repository holds the base of a delta: by headers, file hashes and tensor digests.

The Hub has the SHA-256 of files, and a delta has the BLAKE3 of tensors. So the proof needs a local copy of
the base: its files are compared with the Hub's hashes, its tensors with the delta's digests. If the base is
itself a delta, no copy is needed, because that delta has the digests of its target.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from sparsedelta.errors import (
    AlreadyApplied,
    BaseMismatch,
    BaseNeeded,
    RemoteNotFound,
)
from sparsedelta.format.delta import Delta
from sparsedelta.format.paths import WEIGHT_SUFFIX
from sparsedelta.hub.client import Hub
from sparsedelta.hub.folders import folder_of, raise_if_damaged, rename_in
from sparsedelta.hub.record import BaseRecord, is_content
from sparsedelta.hub.references import Reference, parse_reference
from sparsedelta.hub.repository import Repository, open_repository
from sparsedelta.ops.apply import first_gap
from sparsedelta.ops.base_check import structure_error
from sparsedelta.ops.lookup import Lookup
from sparsedelta.ops.verify import verify
from sparsedelta.progress import Progress


@dataclass(frozen=True, slots=True)
class Proof:
    """The result of a successful proof.

    Attributes:
        base: the base's repository, pinned to a commit.
        record: the base and the hashes of its files, to be stored beside the delta.
        evidence: what the delta was compared with, such as ``"the cached copy"``.
    """

    base: Repository
    record: BaseRecord
    evidence: str


def base_reference(
    delta: Delta, what: str, *, remedy: str = "give the base (base=, --base)"
) -> Reference:
    """Return the repository of the base that a delta names.

    Args:
        delta: the delta.
        what: what the error message calls the delta.
        remedy: what to do if it names none, as a clause.

    Raises:
        BaseNeeded: the delta names no base, or one that is not a repository.
    """
    found = parse_base_id(delta.base.id)
    if found is None:
        stated = f"names {delta.base.id!r}" if delta.base.id else "names nothing"
        raise BaseNeeded(f"{what} {stated} as its base, expected a repository; {remedy}")
    return found


def parse_base_id(stated: str | None) -> Reference | None:
    """Return the repository that a base id names, or None if it names none."""
    try:
        return parse_reference(stated or "")
    except ValueError:
        return None


def prove_base(
    hub: Hub, delta: Delta, reference: Reference, *, local: Path | None, progress: Progress | None
) -> Proof:
    """Return the proof that a repository holds the base of a delta. The whole delta is checked, too.

    Args:
        hub: the Hub.
        delta: the delta.
        reference: the repository.
        local: a copy of the base. None: use the files in the cache; if they are not all there, compare
            the headers of the files on the Hub with the delta, then download the files.
        progress: receives the number of bytes read.

    Raises:
        MismatchError: the repository does not hold the base.
        RemoteError: the repository is not available.
    """
    base = open_repository(hub, reference)
    if base.is_delta_repository:
        return _prove_link(base, delta)
    _check_has_weights(base)
    wanted = base.base_files(delta)
    copies, evidence = _find_copy(base, delta, wanted, local)
    for path, copy in copies.items():
        if not copy.is_file() or not is_content(base.files[path], copy):
            if local is None:
                raise_if_damaged([copy])
            raise BaseMismatch(
                f"'{copy}' is not the file {path!r} of '{base.name}'; leave out the local base to"
                " download it, or name the repository that the local base is from"
            )
    single = local if local is not None and not local.is_dir() else None
    # Only the files that were compared: a local folder may hold the tensors in other files, too.
    with nullcontext(single) if single else folder_of(copies) as folder:
        try:
            verify(delta, base=folder, progress=progress)
        except AlreadyApplied as error:
            raise BaseMismatch(
                f"'{base.name}' is the delta's target, expected its base; name the base's repository"
            ) from error
        except BaseMismatch as error:
            rename_in(error, folder, base.name)
            if not reference.is_pinned:
                error.args = (
                    f"{error}; if the repository has changed since, name the commit that the delta was made from"
                    f" (base_id='{base.reference.repo_id}@<commit>', --base-id)",
                )
            raise
    files = tuple(base.files[path] for path in wanted)
    return Proof(base, BaseRecord(base.name, delta.base_fingerprint.hex(), files), evidence)


def check_remote_structure(base: Repository, delta: Delta) -> None:
    """Check that a base has the tensors that a delta was made from. Only headers are downloaded.

    Raises:
        StructureMismatch: a tensor is missing, or has another dtype or shape.
        RemoteNotFound: the repository holds no weights.
    """
    _check_has_weights(base)
    tensors = [tensor for path in base.weight_files(delta) for tensor in base.tensors(path)]
    lookup = Lookup(tensors, lambda tensor: None)
    for expected in (row.base for row in delta.tensors if row.base):
        if lookup.find(expected) is None:
            raise structure_error(delta, base.name, expected, lookup)


def _check_has_weights(base: Repository) -> None:
    if not base.has_weights:
        raise RemoteNotFound(
            f"repository '{base.name}' holds neither {WEIGHT_SUFFIX} files nor a delta, so it is not a"
            " base; name another repository"
        )


def _find_copy(
    base: Repository, delta: Delta, wanted: list[str], local: Path | None
) -> tuple[dict[str, Path], str]:
    """Return the local path of each file of the base, downloaded if necessary, and what the copy is."""
    if local is not None:
        if local.is_dir():
            return {path: local / path for path in wanted}, f"the local copy '{local}'"
        weights = [path for path in wanted if path.endswith(WEIGHT_SUFFIX)]
        return dict.fromkeys(weights, local), f"the local copy '{local}'"
    cached = base.hub.cached(base.reference, wanted)
    if cached is not None:
        return cached, "the cached copy"
    check_remote_structure(base, delta)
    return base.download(wanted), "a downloaded copy"


def _prove_link(base: Repository, delta: Delta) -> Proof:
    """Return the proof for a base that is itself a delta: the digests of its target."""
    file = base.delta_file()
    with base.read_delta() as before:
        if before.target_fingerprint is None:
            raise BaseMismatch(
                f"the delta in '{base.name}' does not have the digests of its target, which are needed to"
                " verify it as a base; make it again with `sparsedelta diff`"
            )
        check_link(before, delta, base.name)
    reference = Reference(base.reference.repo_id, base.reference.revision, file.path)
    record = BaseRecord(str(reference), delta.base_fingerprint.hex(), (file,))
    return Proof(base, record, "the digests of its target")


def check_link(before: Delta, delta: Delta, name: str) -> None:
    """Check that a delta was made from the target of another, side files included.

    Args:
        before: the other delta.
        delta: the delta.
        name: the repository of the other delta, for messages.

    Raises:
        BaseMismatch: a tensor or a side file of the base is not in that target.
    """
    missing = first_gap(before, delta)
    if missing is not None:
        raise BaseMismatch(
            f"the target of the delta in '{name}' does not have the tensor {missing.name!r} that the next"
            " delta was made from; name the right base",
            tensor=missing.name,
        )
    available = {f.path: (f.n_bytes, f.digest) for f in before.target.side_files}
    for side_file in delta.target.side_files:
        described = (side_file.n_bytes, side_file.digest)
        if not side_file.stored and available.get(side_file.path) != described:
            raise BaseMismatch(
                f"the target of the delta in '{name}' does not have the file {side_file.path!r} that the"
                " next delta was made from, or has another version of it; name the right base"
            )
