"""Whether a repository is a delta's base: by headers, by what the Hub says of its files, and by digests.

The Hub knows SHA-256 of files, a delta BLAKE3 of tensors. A local copy joins the two: its files are the
Hub's, its tensors the delta's. For a base that is a delta itself the digests in it are proof enough.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from sparsedelta.errors import (
    AlreadyApplied,
    BaseMismatch,
    RemoteNotFound,
)
from sparsedelta.format.delta import Delta
from sparsedelta.format.paths import WEIGHT_SUFFIX
from sparsedelta.hub.client import Hub
from sparsedelta.hub.folders import folder_of
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
    """A base that was found to be a delta's.

    Attributes:
        base: its repository, pinned.
        record: what was proved, to be kept beside the delta.
        how: what was compared, in words.
    """

    base: Repository
    record: BaseRecord
    how: str


def base_reference(delta: Delta, what: str) -> Reference:
    """Return where a delta says that its base is.

    Raises:
        RemoteNotFound: it does not say, or not in a way that can be looked up.
    """
    found = parse_base_id(delta.base.id)
    if found is None:
        said = f"only says {delta.base.id!r}" if delta.base.id else "does not say"
        raise RemoteNotFound(f"{what} {said} where its base is; name the base, such as org/model")
    return found


def parse_base_id(stated: str | None) -> Reference | None:
    """Return the repository that a base id names, None if it names none."""
    try:
        return parse_reference(stated or "")
    except ValueError:
        return None


def prove_base(
    hub: Hub, delta: Delta, reference: Reference, *, local: Path | None, progress: Progress | None
) -> Proof:
    """Return the proof that a repository is a delta's base.

    Args:
        hub: where it is.
        delta: the delta; all of it is checked, too.
        reference: of the base.
        local: a copy of the base. Without one the cache is looked in; what is not there is
            downloaded into it, once headers have shown that it can be the base.
        progress: told of the bytes read.

    Raises:
        MismatchError: it is not.
        RemoteError: it is not available.
    """
    base = open_repository(hub, reference)
    if base.is_delta_repository:
        return _prove_link(base, delta)
    _check_has_weights(base)
    wanted = base.base_files(delta)
    places, how = _find_copy(base, delta, wanted, local)
    for path, place in places.items():
        if not place.is_file() or not is_content(base.files[path], place):
            raise BaseMismatch(
                f"'{place}' is not the file {path!r} of '{base.name}'; leave the local base away to"
                " have it downloaded, or name the repository that it is from"
            )
    single = local if local is not None and not local.is_dir() else None
    # Only the files compared: a local copy may have the tensors in others, too.
    with nullcontext(single) if single else folder_of(places) as folder:
        try:
            verify(delta, base=folder, progress=progress)
        except AlreadyApplied as error:
            raise BaseMismatch(
                f"'{base.name}' is the delta's target, not its base; name the base's repository"
            ) from error
    files = tuple(base.files[path] for path in wanted)
    return Proof(base, BaseRecord(base.name, delta.base_fingerprint.hex(), files), how)


def check_remote_structure(base: Repository, delta: Delta) -> None:
    """Check that a base has the tensors that a delta is made from; only headers are fetched.

    Raises:
        StructureMismatch: one is not there, or has another dtype or shape.
        RemoteNotFound: there are no weights in the repository.
    """
    _check_has_weights(base)
    tensors = [tensor for path in base.weight_files(delta) for tensor in base.tensors(path)]
    lookup = Lookup(tensors, lambda tensor: None)
    for expected in (row.base for row in delta.tensors if row.base):
        if lookup.find(expected) is None:
            found = lookup.at(expected.file, expected.name)
            raise structure_error(delta, base.name, expected, found.spec if found else None)


def _check_has_weights(base: Repository) -> None:
    if not base.has_weights:
        raise RemoteNotFound(
            f"repository '{base.name}' holds neither {WEIGHT_SUFFIX} files nor a delta; a base needs"
            " one or the other"
        )


def _find_copy(
    base: Repository, delta: Delta, wanted: list[str], local: Path | None
) -> tuple[dict[str, Path], str]:
    """Return where a copy of the base is, downloaded if it must be, and what to call it."""
    if local is not None:
        if local.is_dir():
            return {path: local / path for path in wanted}, f"the local copy '{local}'"
        weights = [path for path in wanted if path.endswith(WEIGHT_SUFFIX)]
        return dict.fromkeys(weights, local), f"the local copy '{local}'"
    cached = base.hub.cached(base.reference, wanted)
    if cached is not None:
        return cached, "the copy in the cache"
    check_remote_structure(base, delta)
    return base.download(wanted), "a download of it"


def _prove_link(base: Repository, delta: Delta) -> Proof:
    """Prove a base that is the target of a delta by fingerprint and by the digests of side files."""
    file = base.delta_file()
    with base.read_delta() as before:
        if before.target_fingerprint is None:
            raise BaseMismatch(
                f"the delta in '{base.name}' does not have the digests of its target, so it cannot be"
                " shown to be a base; make it again with `sparsedelta diff`"
            )
        check_link(before, delta, base.name)
    reference = Reference(base.reference.repo_id, base.reference.revision, file.path)
    record = BaseRecord(str(reference), delta.base_fingerprint.hex(), (file,))
    return Proof(base, record, "the digests of its target")


def check_link(before: Delta, delta: Delta, name: str) -> None:
    """Check that a delta was made from the target of another, files and all.

    Raises:
        BaseMismatch: it was not.
    """
    missing = first_gap(before, delta)
    if missing is not None:
        raise BaseMismatch(
            f"the delta in '{name}' does not make tensor {missing.name!r} that the delta above it was"
            " made from; it is not its base",
            tensor=missing.name,
        )
    there = {f.path: (f.n_bytes, f.digest) for f in before.target.side_files}
    for side_file in delta.target.side_files:
        described = (side_file.n_bytes, side_file.digest)
        if not side_file.stored and there.get(side_file.path) != described:
            raise BaseMismatch(
                f"file {side_file.path!r} is not, or another, in the target of the delta in '{name}';"
                " it is not the base that the delta above it was made from"
            )
