"""``pull``: download a delta, and its base if it is not available locally, and rebuild the target.

Downloads go to the Hub's cache and are verified. The output appears when it is complete, as with ``apply``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from sparsedelta._typing import AnyPath
from sparsedelta.errors import MismatchError
from sparsedelta.format.delta import Delta
from sparsedelta.format.paths import DELTA_SUFFIX
from sparsedelta.fs import check_absent, staged_output
from sparsedelta.hub.chain import (
    Link,
    base_folder,
    links_above,
    open_chain,
    open_chain_from,
    open_link,
)
from sparsedelta.hub.client import Hub, Token
from sparsedelta.hub.references import Reference, parse_reference
from sparsedelta.hub.repository import open_repository
from sparsedelta.ops.apply import apply, check_apart
from sparsedelta.progress import Progress
from sparsedelta.tensors.rebuild import Check

COUNTED_NAME = "config.json"  # the Hub counts downloads of this file


@dataclass(frozen=True, slots=True)
class PullReport:
    """The result of ``pull``.

    Attributes:
        out: path of the target, a folder or a file.
        delta: reference of the delta, pinned to a commit.
        applied: references of all deltas that were applied, in order.
        base: the base, as a pinned reference or a local path.
        kept_delta: path of the delta, if it was kept.
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
    durable: bool = True,
    overwrite: bool = False,
    token: Token = None,
    progress: Progress | None = None,
) -> PullReport:
    """Rebuild the target of a delta on the Hub at ``out``; return what was used.

    The delta, and the base at the commit that the delta names, are downloaded unless they are in the
    Hub's cache. If the base is itself a delta, it is rebuilt the same way.

    Args:
        repo_id: ``org/name``, or ``hf://org/name/path@revision``.
        out: path of the folder to write, or of the file if the target is a single file.
        revision: revision of the delta's repository; None: its default branch.
        subfolder: folder of the delta, if the repository holds several.
        base: a local copy of the base, or of any checkpoint further down the chain; or the repository of
            one of these, ``org/model`` or ``org/model@revision``. Without a revision, the commit is the one that the
            chain names.
        base_revision: revision of the base, used instead of the commit that the delta names.
        keep_delta: also keep the delta, as the file ``out`` + ``.sd``.
        verify: as for ``apply``.
        durable: as for ``apply``.
        overwrite: replace ``out`` if it exists.
        token: access token for the Hub; None: that of `hf auth login`.
        progress: receives the number of bytes written.

    Raises:
        RemoteError: a repository or file is not available.
        MismatchError: the base is not the base of the delta.
        BaseNeeded: a delta names no base.
        FormatError: a delta cannot be read.
        FileExistsError: ``out`` exists and ``overwrite`` is false.
        ValueError: an argument is wrong.
    """
    reference = _reference(repo_id, revision, subfolder)
    if base is not None and base_revision is not None:
        raise ValueError(
            "base and base_revision cannot be given together; give the base as org/model@revision"
        )
    target = Path(out)
    kept_delta = Path(f"{os.path.abspath(out)}{DELTA_SUFFIX}") if keep_delta else None
    local = _local_base(base)
    check_apart([] if local is None else [local], out)
    for path in filter(None, (target, kept_delta)):
        check_absent(path, overwrite=overwrite)
    hub = Hub(token)
    with ExitStack() as stack:
        link = open_link(open_repository(hub, reference))
        stack.enter_context(link.delta)
        if COUNTED_NAME in link.repository.files:
            link.repository.download_one(COUNTED_NAME)
        work = _Pull(hub, link, target, verify, durable, overwrite, progress, stack)
        if local is not None:
            applied = work.apply_to_local(local)
            base_name = str(local)
        else:
            base_reference = None if base is None else parse_reference(os.fspath(base))
            applied, base_name = work.apply_to_remote(base_reference, base_revision)
        if kept_delta is not None:
            with staged_output(kept_delta, overwrite=overwrite) as staged:
                shutil.copyfile(link.local_path, staged)
    references = tuple(str(one.reference) for one in applied)
    return PullReport(target, str(link.reference), references, base_name, kept_delta)


@dataclass(frozen=True)
class _Pull:
    """A pull after the download of its delta: applies the delta, or its chain, to a base."""

    hub: Hub
    link: Link
    out: Path
    verify: Check
    durable: bool
    overwrite: bool
    progress: Progress | None
    stack: ExitStack

    def apply_to_local(self, base: Path) -> list[Link]:
        """Apply the delta to a base on disk, or all deltas of the chain above it; return those applied."""
        try:
            self._apply(base, [self.link.delta])
            return [self.link]
        except MismatchError as error:
            links = links_above(self.hub, self.link, base, error)
        self._close_at_end(links)
        self._apply(base, [one.delta for one in links])
        return links

    def apply_to_remote(
        self, base_reference: Reference | None, base_revision: str | None
    ) -> tuple[list[Link], str]:
        """Apply the chain, or the links above a given base, to its base; return the links and the base's name."""
        if base_reference is None:
            links, base = open_chain(self.hub, self.link, base_revision=base_revision)
        else:
            links, base = open_chain_from(self.hub, self.link, base_reference)
        self._close_at_end(links)
        with base_folder(base, links[0].delta, links[0]) as folder:
            self._apply(folder, [one.delta for one in links])
        return links, base.name

    def _close_at_end(self, links: Sequence[Link]) -> None:
        for one in links:
            if one is not self.link:
                self.stack.enter_context(one.delta)

    def _apply(self, base: Path, deltas: Sequence[Delta]) -> None:
        apply(
            base,
            deltas,
            self.out,
            verify=self.verify,
            durable=self.durable,
            overwrite=self.overwrite,
            progress=self.progress,
        )


def _reference(repo_id: str, revision: str | None, subfolder: str | None) -> Reference:
    reference = parse_reference(repo_id)
    if reference is None:
        raise ValueError(f"{repo_id!r} is not a repository; write org/name or hf://org/name/path")
    if revision is not None and reference.revision not in (None, revision):
        raise ValueError(f"{repo_id!r} and revision={revision!r} both name a revision; give one")
    if subfolder is not None and reference.path not in (None, subfolder):
        raise ValueError(f"{repo_id!r} and subfolder={subfolder!r} both name a path; give one")
    return Reference(reference.repo_id, revision or reference.revision, subfolder or reference.path)


def _local_base(base: AnyPath | None) -> Path | None:
    """Return the base as a path; None if it is a repository or not given."""
    if base is None:
        return None
    if os.path.exists(base) or parse_reference(os.fspath(base)) is None:
        return Path(base)
    return None
