"""``pull``: from a delta repository to the target on disk, fetching the base where it is not available locally.

What is downloaded is cached and checked; the output appears whole or not at all, as ``apply`` makes it.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from sparsedelta._typing import AnyPath
from sparsedelta.errors import MismatchError, StructureMismatch
from sparsedelta.files.checkpoint import Checkpoint, Tensor
from sparsedelta.format.delta import Delta
from sparsedelta.fs import check_absent, staged_output
from sparsedelta.hub.base_proof import parse_base_id
from sparsedelta.hub.chain import (
    Link,
    base_folder,
    follow,
    follow_to,
    open_link,
)
from sparsedelta.hub.client import Hub, Token
from sparsedelta.hub.references import DELTA_SUFFIX, Reference, parse_reference
from sparsedelta.hub.repository import open_repository
from sparsedelta.ops.apply import apply, check_apart
from sparsedelta.ops.base_check import find_base, open_base
from sparsedelta.progress import Progress
from sparsedelta.tensors.compare import digest_tensor
from sparsedelta.tensors.rebuild import Check

COUNTED_NAME = "config.json"


@dataclass(frozen=True, slots=True)
class PullReport:
    """What was pulled.

    Attributes:
        out: the folder or file made.
        delta: reference of the delta, pinned.
        applied: references of all deltas applied, in order.
        base: the base, a pinned reference or a local path.
        kept_delta: where the delta was kept, if it was.
    """

    out: Path
    delta: str
    applied: tuple[str, ...]
    base: str
    kept_delta: Path | None


def pull(
    repo_id: str,
    out: AnyPath,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    base: AnyPath | None = None,
    base_revision: str | None = None,
    keep_delta: bool = False,
    verify: Check = "full",
    overwrite: bool = False,
    token: Token = None,
    progress: Progress | None = None,
) -> PullReport:
    """Make the target of a delta on the Hub under the name ``out``; return where all of it is from.

    The delta, and the base at the commit that the delta names, are downloaded into the Hub's cache
    unless they are there. A base that is a delta repository itself is made the same way.

    Args:
        repo_id: ``org/name``, or ``hf://org/name/path@revision``.
        out: the folder to make, or the file if the target is a single file.
        revision: of the delta's repository; None: its default branch.
        subfolder: folder of the delta, where the repository holds several.
        base: a local copy of the base, or of any checkpoint further down the chain; or the
            repository of one, ``org/model`` or ``org/model@revision``.
        base_revision: of the base that the delta names, in place of the commit that it names.
        keep_delta: keep the delta, too, beside ``out`` as ``out`` + ``.sd``.
        verify: as for ``apply``.
        overwrite: replace what is at ``out``.
        token: of the Hub; None: the one that is logged in.
        progress: told of the bytes written.

    Raises:
        RemoteError: something is not available.
        MismatchError: a base is not the delta's.
        FormatError: a delta cannot be read.
        FileExistsError: ``out`` exists and ``overwrite`` is false.
        ValueError: an argument is wrong.
    """
    reference = _wanted(repo_id, revision, subfolder)
    if base is not None and base_revision is not None:
        raise ValueError(
            "base and base_revision exclude each other; give the base as org/model@revision"
        )
    target = Path(out)
    kept = Path(f"{os.path.abspath(out)}{DELTA_SUFFIX}") if keep_delta else None
    for path in filter(None, (target, kept)):
        check_absent(path, overwrite=overwrite)
    hub = Hub(token)
    with ExitStack() as stack:
        link = open_link(open_repository(hub, reference))
        stack.enter_context(link.delta)
        if COUNTED_NAME in link.repository.files:  # by which the Hub counts downloads
            link.repository.download_one(COUNTED_NAME)
        made = _Pull(hub, link, target, verify, overwrite, progress, stack)
        local = _local_base(base)
        if local is not None:
            applied = made.on_local(local)
            used = str(local)
        else:
            given = None if base is None else parse_reference(os.fspath(base))
            applied, used = made.on_remote(given, base_revision)
        if kept is not None:
            with staged_output(kept, overwrite=overwrite) as staged:
                shutil.copyfile(link.place, staged)
    return PullReport(
        target, str(link.reference), tuple(str(one.reference) for one in applied), used, kept
    )


@dataclass(frozen=True)
class _Pull:
    """A pull whose delta has been downloaded."""

    hub: Hub
    link: Link
    out: Path
    verify: Check
    overwrite: bool
    progress: Progress | None
    stack: ExitStack

    def on_local(self, base: Path) -> list[Link]:
        """Apply to a base on disk: the delta alone, or those between the base and it; return them."""
        check_apart([base], self.out)
        try:
            self._apply(base, [self.link.delta])
            return [self.link]
        except MismatchError as error:
            links = self._down_to(base, error)
        self._apply(base, [one.delta for one in links])
        return links

    def on_remote(
        self, given: Reference | None, base_revision: str | None
    ) -> tuple[list[Link], str]:
        """Apply to the base of the delta, or to the one given; return what was applied, and to what."""
        if given is None:
            links, base = follow(self.hub, self.link, base_revision=base_revision)
        else:
            links, base = [self.link], open_repository(self.hub, given)
        self._hold(links)
        with base_folder(base, links[0].delta, links[0]) as folder:
            self._apply(folder, [one.delta for one in links])
        return links, base.name

    def _down_to(self, base: Path, error: MismatchError) -> list[Link]:
        """Return the links from the one that a local base is the base of; raise the error if there is none."""
        below = parse_base_id(self.link.delta.base.id)
        if below is None or not open_repository(self.hub, below).is_delta_repository:
            raise error
        with open_base(base, self.link.delta) as checkpoint:
            links = follow_to(self.hub, self.link, _base_test(checkpoint))
        if links is None:
            raise error
        self._hold(links)
        return links

    def _hold(self, links: Sequence[Link]) -> None:
        for one in links:
            if one is not self.link:
                self.stack.enter_context(one.delta)

    def _apply(self, base: Path, deltas: Sequence[Delta]) -> None:
        apply(
            base,
            deltas,
            self.out,
            verify=self.verify,
            overwrite=self.overwrite,
            progress=self.progress,
        )


def _wanted(repo_id: str, revision: str | None, subfolder: str | None) -> Reference:
    reference = parse_reference(repo_id)
    if reference is None:
        raise ValueError(f"{repo_id!r} is not a repository; write org/name or hf://org/name/path")
    if revision is not None and reference.revision not in (None, revision):
        raise ValueError(
            f"{repo_id!r} names a revision and so does revision={revision!r}; give one"
        )
    if subfolder is not None and reference.path not in (None, subfolder):
        raise ValueError(f"{repo_id!r} names a path and so does subfolder={subfolder!r}; give one")
    return Reference(reference.repo_id, revision or reference.revision, subfolder or reference.path)


def _local_base(base: AnyPath | None) -> Path | None:
    """Return a base that is a path, None if it is a repository or not given."""
    if base is None:
        return None
    if os.path.exists(base) or parse_reference(os.fspath(base)) is None:
        return Path(base)
    return None


def _base_test(checkpoint: Checkpoint) -> Callable[[Delta], bool]:
    """Return what tells whether a checkpoint has all tensors that a delta is made from."""
    digest: Callable[[Tensor], bytes] = functools.cache(digest_tensor)

    def is_base(delta: Delta) -> bool:
        try:
            found = find_base(delta, checkpoint)
        except StructureMismatch:
            return False
        return all(
            digest(found[row.key]) == row.base.spec.digest for row in delta.tensors if row.base
        )

    return is_base
