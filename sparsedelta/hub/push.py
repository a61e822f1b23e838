"""``push``: upload a delta to a repository in one commit, after the proof of its base.

Nothing is uploaded before the proof. A push never overwrites a commit that somebody else made meanwhile.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sparsedelta._typing import AnyPath
from sparsedelta.errors import FormatError, RemoteConflict, RemoteNotFound
from sparsedelta.files import junk
from sparsedelta.files.side_files import carried_content, is_of_other_files
from sparsedelta.files.unread import UNREAD_WEIGHT_SUFFIXES
from sparsedelta.format.delta import AnyDelta, Delta, opened
from sparsedelta.format.paths import DELTA_SUFFIX, WEIGHT_SUFFIX, path_problem
from sparsedelta.fs import temporary_folder
from sparsedelta.hub.base_proof import Proof, base_reference, parse_base_id, prove_base
from sparsedelta.hub.card import CARD_NAME, CardFacts, updated_card
from sparsedelta.hub.chain import read_record
from sparsedelta.hub.client import Hub, RemoteFile, Token
from sparsedelta.hub.errors import remote_errors
from sparsedelta.hub.record import is_content, record_path, render_record
from sparsedelta.hub.references import DELTA_NAME, Reference, is_repo_id
from sparsedelta.hub.repository import Repository
from sparsedelta.hub.secrets import check_secrets
from sparsedelta.ops.inspect import inspect
from sparsedelta.progress import Progress
from sparsedelta.redaction import without_password
from sparsedelta.report.png import picture_of, render_png

CONFIG_NAME = "config.json"
PICTURE_SUFFIX = ".png"
MAIN = "main"
PULL_REQUEST = "refs/pr/"


@dataclass(frozen=True, slots=True)
class PushedFile:
    """A file of a push: its path in the repository, its size, and whether it has to be uploaded."""

    path: str
    n_bytes: int
    changed: bool


@dataclass(frozen=True, slots=True)
class PushReport:
    """The result of ``push``.

    Attributes:
        repo_id: the repository.
        url: its address.
        commit: the commit that holds the delta; None if there is none yet (dry run).
        committed: whether a commit was made; False if the repository already had all files.
        pull_request: address of the pull request, if one was opened.
        tag: the tag, if one was set.
        base: the base, pinned to a commit.
        proof: what the delta was compared with to verify the base.
        files: all files of the push.
        card: the text of the model card.
        dry_run: whether nothing was uploaded.
    """

    repo_id: str
    url: str
    commit: str | None
    committed: bool
    pull_request: str | None
    tag: str | None
    base: str
    proof: str
    files: tuple[PushedFile, ...]
    card: str
    dry_run: bool


@dataclass(frozen=True, slots=True)
class _Destination:
    """The branch to push to.

    Attributes:
        exists: whether the repository exists.
        branch: the branch or pull request.
        head: its commit; None if it does not exist yet.
        tags: the tags of the repository.
        repository: the files at ``head`` or, for a new branch, of the default branch; None if it is new.
    """

    exists: bool
    branch: str
    head: str | None
    tags: Mapping[str, str]
    repository: Repository | None


class _Sent(NamedTuple):
    """The part of ``PushReport`` that the upload determines."""

    commit: str | None
    committed: bool
    pull_request: str | None
    tag: str | None


def push(
    delta: AnyDelta,
    repo_id: str,
    *,
    base_id: str | None = None,
    base: AnyPath | None = None,
    subfolder: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    tag: str | None = None,
    token: Token = None,
    dry_run: bool = False,
    allow_secrets: bool = False,
    progress: Progress | None = None,
) -> PushReport:
    """Upload a delta with a model card to a repository, in one commit; return a report.

    First the base is pinned to a commit and verified; see ``sparsedelta.hub.base_proof``. A second push
    of the same delta makes no commit.

    Args:
        delta: an ``.sd`` file or a loaded delta.
        repo_id: ``org/name``; created if it does not exist.
        base_id: repository of the base, ``org/model`` or ``org/model@revision``; None: the one that the
            delta names.
        base: a local copy of the base, used instead of the cache or a download.
        subfolder: folder for the delta, if the repository holds several.
        private: whether a new repository is private.
        revision: branch to push to, created from the default branch if it does not exist; or
            ``refs/pr/N`` for an open pull request.
        create_pr: open a pull request instead of pushing to the branch.
        commit_message: first line of the commit message.
        commit_description: the rest of the commit message.
        tag: a tag to set on the commit.
        token: access token for the Hub; None: that of `hf auth login`.
        dry_run: upload nothing, only return the report.
        allow_secrets: push even if the delta holds what looks like a credential.
        progress: receives the number of bytes of the base that were read.

    Raises:
        MismatchError: the base is not the base of the delta.
        BaseNeeded: the delta names no base, and ``base_id`` is None.
        FormatError: the delta cannot be read.
        RemoteError: the Hub cannot be reached or refuses, or somebody else pushed meanwhile.
        ValueError: an argument is wrong, or the delta holds what looks like a credential or is one between files that
            are not safetensors.
    """
    _check_arguments(repo_id, subfolder, revision, create_pr=create_pr)
    path = f"{subfolder}/{DELTA_NAME}" if subfolder else DELTA_NAME
    with (
        opened(delta) as opened_delta,
        temporary_folder("push") as folder,
    ):
        if is_of_other_files(opened_delta):
            raise ValueError(
                "the delta is one between files that are not safetensors, whose base push cannot check; upload it as a file:"
                f" `hf upload {repo_id} {'delta.sd' if isinstance(delta, Delta) else delta}`"
            )
        if not allow_secrets:
            check_secrets(opened_delta)
        hub = Hub(token, cached_listing=False)
        destination = _find_destination(hub, repo_id, revision or MAIN, tag, create_pr=create_pr)
        recorded = _recorded_base(opened_delta, destination, path)
        reference = _wanted_base(opened_delta, base_id, recorded)
        repository = destination.repository
        is_beside = repository is not None and repository.has_weights and subfolder is None
        if reference.repo_id == repo_id and is_beside:
            raise ValueError(
                f"repository '{repo_id}' is the base itself, and its name would mean the base and the delta; push to another"
                " repository, or to a folder of this one (subfolder=, --subfolder)"
            )
        local = Path(base) if base is not None else None
        proof = prove_base(hub, opened_delta, reference, local=local, progress=progress)
        local_files = _make_files(hub, opened_delta, repo_id, path, proof, destination, folder)
        files = tuple(
            PushedFile(name, file.stat().st_size, _is_changed(destination, name, file))
            for name, file in local_files.items()
        )
        if tag is not None and tag in destination.tags and any(file.changed for file in files):
            raise _tag_exists(repo_id, tag, destination.tags)
        card = local_files[CARD_NAME].read_text("utf-8")
        sent = _Sent(destination.head, committed=False, pull_request=None, tag=None)
        if not dry_run:
            sent = _send(
                hub,
                repo_id,
                destination,
                {file.path: local_files[file.path] for file in files if file.changed},
                message=commit_message or f"Push {path} with sparsedelta",
                description=commit_description,
                create_pr=create_pr,
                private=private,
                tag=tag,
            )
    url = f"{without_password(hub.endpoint)}/{repo_id}"
    return PushReport(repo_id, url, *sent, proof.record.base, proof.evidence, files, card, dry_run)


def _check_arguments(
    repo_id: str, subfolder: str | None, revision: str | None, *, create_pr: bool
) -> None:
    if not is_repo_id(repo_id):
        raise ValueError(f"{repo_id!r} is not the name of a repository; write org/name")
    problem = path_problem(subfolder) if subfolder is not None else None
    if problem:
        raise ValueError(f"subfolder {subfolder!r} {problem}")
    if create_pr and revision not in (None, MAIN):
        raise ValueError(
            f"a pull request is always opened on {MAIN!r}, but the revision is {revision!r}; leave out"
            " the revision or the pull request"
        )


def _recorded_base(delta: Delta, destination: _Destination, path: str) -> Reference | None:
    """Return the verified base of the delta now at ``path``, if the new delta was made from the same tensors."""
    repository = destination.repository
    if repository is None or path not in repository.files:
        return None
    record = read_record(repository, path)
    if record is None or record.fingerprint != delta.base_fingerprint.hex():
        return None
    return parse_base_id(record.base)


def _wanted_base(delta: Delta, base_id: str | None, recorded: Reference | None) -> Reference:
    """Return the base to verify: ``base_id``, else the one the delta names, else the recorded one.

    If the delta or the record names ``base_id`` at a commit, that commit is used.
    """
    known = [one for one in (parse_base_id(delta.base.id), recorded) if one is not None]
    if base_id is None:
        remedy = "name the base, such as org/model (base_id=, --base-id)"
        return known[0] if known else base_reference(delta, "the delta", remedy=remedy)
    wanted = parse_base_id(base_id)
    if wanted is None:
        raise ValueError(
            f"base_id {base_id!r} is not a repository; write org/model or org/model@revision"
        )
    if wanted.revision is None:
        for one in known:
            is_there = (one.path or DELTA_NAME) in wanted.delta_paths
            if one.is_pinned and one.repo_id == wanted.repo_id and is_there:
                return one
    return wanted


def _find_destination(
    hub: Hub, repo_id: str, branch: str, tag: str | None, *, create_pr: bool
) -> _Destination:
    refs = hub.refs(repo_id)
    if refs is None:
        if create_pr:
            raise RemoteNotFound(
                f"there is no repository '{repo_id}' to open a pull request on, or it is private;"
                " check the name, or log in with `hf auth login`"
            )
        return _Destination(False, branch, None, {}, None)
    head = refs.branches.get(branch)
    if head is None and branch.startswith(PULL_REQUEST):
        head = hub.pin(Reference(repo_id, branch)).revision
    start = head or refs.branches.get(MAIN)
    if tag is not None and refs.tags.get(tag, head) != head:
        raise _tag_exists(repo_id, tag, refs.tags)
    pinned = Reference(repo_id, start)
    repository = Repository(hub, pinned, hub.files(pinned)) if start else None
    return _Destination(True, branch, head, refs.tags, repository)


def _tag_exists(repo_id: str, tag: str, tags: Mapping[str, str]) -> RemoteConflict:
    return RemoteConflict(
        f"repository '{repo_id}' already has a tag {tag!r}, at {tags[tag][:12]}; choose another name"
    )


def _make_files(
    hub: Hub,
    delta: Delta,
    repo_id: str,
    path: str,
    proof: Proof,
    destination: _Destination,
    folder: Path,
) -> dict[str, Path]:
    """Write the files of the push into a folder; return their local paths by path in the repository."""
    pinned = dataclasses.replace(delta, base=dataclasses.replace(delta.base, id=proof.record.base))
    local_files = {path: folder / DELTA_NAME}
    pinned.save(local_files[path])
    found = inspect(local_files[path])
    contents = {record_path(path): render_record(proof.record)}
    shown = picture_of(found)
    picture = path.removesuffix(DELTA_SUFFIX) + PICTURE_SUFFIX
    if shown is not None:
        contents[picture] = render_png(shown)
    others = destination.repository.files if destination.repository else {}
    here = path.removesuffix(DELTA_NAME)
    config = None if _has_weights(others, here) else _config(delta, proof)
    if config is not None:
        contents[here + CONFIG_NAME] = config
    facts = CardFacts(
        repo_id=repo_id,
        path=path,
        base=proof.base.reference,
        base_is_delta=proof.base.is_delta_repository,
        base_metadata=hub.metadata(proof.base.reference),
        found=found,
        file_bytes=local_files[path].stat().st_size,
        target_bytes=found.target_bytes + sum(file.n_bytes for file in found.side_files),
        picture=(picture, shown) if shown is not None else None,
        endpoint=without_password(hub.endpoint),
    )
    alone = all(not p.endswith(DELTA_SUFFIX) or p == path for p in others)
    dropped = _dropped_base(destination.repository, path, facts.base.repo_id)
    card = updated_card(_existing_card(destination), facts, alone=alone, dropped=dropped)
    contents[CARD_NAME] = card.encode()
    for number, (name, content) in enumerate(contents.items()):
        local_files[name] = folder / f"file-{number}"
        local_files[name].write_bytes(content)
    return local_files


def _dropped_base(repository: Repository | None, path: str, base: str) -> str | None:
    """Return the base of the delta now at ``path`` if no other delta has it and the new one has another."""
    if repository is None:
        return None
    former = _named_base(repository, path)
    others = (p for p in repository.files if p.endswith(DELTA_SUFFIX) and p != path)
    if former in (None, base) or any(_named_base(repository, p) == former for p in others):
        return None
    return former


def _named_base(repository: Repository, path: str) -> str | None:
    """Return the repository of the base that is recorded beside a delta; None if no record can be read."""
    try:
        record = read_record(repository, path)
    except FormatError:
        return None
    found = parse_base_id(record.base) if record else None
    return found.repo_id if found else None


def _existing_card(destination: _Destination) -> str | None:
    repository = destination.repository
    if repository is None or CARD_NAME not in repository.files:
        return None
    return repository.download_one(CARD_NAME).read_text("utf-8", "replace")


def _has_weights(paths: Iterable[str], folder: str) -> bool:
    """Return whether weights lie directly in a folder of a repository, whose ``config.json`` is that of these weights."""
    suffixes = (WEIGHT_SUFFIX, *UNREAD_WEIGHT_SUFFIXES)
    return any(
        path.startswith(folder)
        and "/" not in path[len(folder) :]
        and junk.is_weights(path, suffixes)
        for path in paths
    )


def _config(delta: Delta, proof: Proof) -> bytes | None:
    """Return the ``config.json`` of the target, or None if it has none.

    The Hub counts downloads of this file and reads the model's architecture from it.
    """
    for file in delta.target.side_files:
        if file.path == CONFIG_NAME and file.stored:
            return carried_content(delta, file, file.stored)
    base = proof.base
    folder = base.delta_file().path.rpartition("/")[0] if base.is_delta_repository else ""
    path = f"{folder}/{CONFIG_NAME}" if folder else CONFIG_NAME
    return base.download_one(path).read_bytes() if path in base.files else None


def _is_changed(destination: _Destination, path: str, file: Path) -> bool:
    repository = destination.repository
    existing: RemoteFile | None = repository.files.get(path) if repository else None
    return existing is None or not is_content(existing, file)


def _send(
    hub: Hub,
    repo_id: str,
    destination: _Destination,
    changed: Mapping[str, Path],
    *,
    message: str,
    description: str | None,
    create_pr: bool,
    private: bool | None,
    tag: str | None,
) -> _Sent:
    """Create the repository and branch if necessary, commit the changed files if there are any, set the tag."""
    from huggingface_hub import CommitOperationAdd

    commit = destination.head or _make_branch(hub, repo_id, destination, private)
    pull_request = None
    # One commit with the examined commit as its parent: it is complete or absent, and reverts nothing.
    with remote_errors(Reference(repo_id, destination.branch)):
        if changed:
            done = hub.api.create_commit(
                repo_id,
                [CommitOperationAdd(path, str(file)) for path, file in changed.items()],
                commit_message=message,
                commit_description=description,
                revision=destination.branch,
                create_pr=create_pr,
                parent_commit=commit,
            )
            commit, pull_request = done.oid, done.pr_url if create_pr else None
        if tag is not None and commit is not None and destination.tags.get(tag) != commit:
            hub.api.create_tag(repo_id, tag=tag, revision=commit)
    return _Sent(commit, bool(changed), pull_request, tag if commit else None)


def _make_branch(
    hub: Hub, repo_id: str, destination: _Destination, private: bool | None
) -> str | None:
    """Create the repository or branch if it is missing; return the commit of the branch."""
    with remote_errors(Reference(repo_id)):
        if not destination.exists:
            hub.api.create_repo(repo_id, private=private, exist_ok=True)
        if destination.branch != MAIN:
            repository = destination.repository
            start = repository.reference.revision if repository else None
            hub.api.create_branch(repo_id, branch=destination.branch, revision=start, exist_ok=True)
    refs = hub.refs(repo_id)
    return refs.branches.get(destination.branch) if refs else None
