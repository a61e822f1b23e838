"""``push``: a delta into a repository, in one commit, once its base is proved.

Nothing is uploaded before the proof, and nothing is written over what somebody else pushed meanwhile.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sparsedelta._typing import AnyPath
from sparsedelta.errors import RemoteConflict, RemoteNotFound
from sparsedelta.files.side_files import carried_content
from sparsedelta.format.delta import AnyDelta, Delta, opened
from sparsedelta.format.paths import path_problem
from sparsedelta.hub.base_proof import Proof, base_reference, parse_base_id, prove_base
from sparsedelta.hub.card import CARD_NAME, CardFacts, renewed_card
from sparsedelta.hub.chain import read_record
from sparsedelta.hub.client import Hub, RemoteFile, Token
from sparsedelta.hub.errors import told
from sparsedelta.hub.record import is_content, record_path, render_record
from sparsedelta.hub.references import DELTA_NAME, DELTA_SUFFIX, Reference, is_repo_id
from sparsedelta.hub.repository import Repository
from sparsedelta.hub.secrets import check_secrets
from sparsedelta.ops.inspect import inspect
from sparsedelta.progress import Progress
from sparsedelta.redaction import without_password
from sparsedelta.report.png import changed_grid, render_png

CONFIG_NAME = "config.json"
PICTURE_SUFFIX = ".png"
MAIN = "main"
PULL_REQUEST = "refs/pr/"


@dataclass(frozen=True, slots=True)
class PushedFile:
    """A file of a push: its path in the repository, its size, and whether it is new to it."""

    path: str
    n_bytes: int
    changed: bool


@dataclass(frozen=True, slots=True)
class PushReport:
    """What was pushed, or would be.

    Attributes:
        repo_id: of the repository.
        url: where to look at it.
        commit: the commit that holds the delta; None if none was made.
        committed: whether a commit was made; no: the repository already had everything.
        pull_request: address of the pull request, if one was made.
        tag: the tag set, if one was.
        base: the base, pinned.
        proof: what showed that it is the base.
        files: all files of the push.
        card: the text of the model card.
        dry_run: whether nothing was sent.
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
class _Place:
    """Where to push: the branch, its commit (None: not there yet), and what is in it."""

    exists: bool
    branch: str
    head: str | None
    tags: Mapping[str, str]
    repository: Repository | None


class _Sent(NamedTuple):
    """What was sent; see ``PushReport``."""

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
    """Put a delta into a repository, with a card, in one commit; return what was done.

    The base is pinned to a commit and proved first; see ``sparsedelta.hub.base_proof``. Pushing the same
    delta again makes no commit.

    Args:
        delta: an ``.sd`` file or a loaded delta.
        repo_id: ``org/name``; made if it does not exist.
        base_id: repository of the base, ``org/model`` or ``org/model@revision``; None: what the
            delta says.
        base: a local copy of the base, so that it need be neither in the cache nor downloaded.
        subfolder: folder of the repository to put it in, where there are several.
        private: whether a repository that is made is private.
        revision: branch to push to, made from the default branch if it does not exist; or
            ``refs/pr/N``, a pull request that is open.
        create_pr: open a pull request in place of pushing to the branch.
        commit_message: first line of the commit's message.
        commit_description: the rest of it.
        tag: a tag to set on the commit.
        token: of the Hub; None: the one that is logged in.
        dry_run: send nothing, only tell what would be sent.
        allow_secrets: push files and records even if they hold what looks like a credential.
        progress: told of the bytes of the base that are read.

    Raises:
        MismatchError: the base is not the delta's.
        FormatError: the delta cannot be read.
        RemoteError: the Hub refuses, cannot be reached, or somebody else pushed meanwhile.
        ValueError: an argument is wrong, or the delta holds what looks like a credential.
    """
    _check_arguments(repo_id, subfolder, revision, create_pr=create_pr)
    path = f"{subfolder}/{DELTA_NAME}" if subfolder else DELTA_NAME
    with (
        opened(delta) as given,
        tempfile.TemporaryDirectory(prefix="sparsedelta-push-") as folder,
    ):
        if not allow_secrets:
            check_secrets(given)
        hub = Hub(token, cache_will_do=False)
        place = _find_place(hub, repo_id, revision or MAIN, tag, create_pr=create_pr)
        recorded = _recorded_base(given, place, path)
        reference = _wanted_base(given, base_id, recorded)
        local = Path(base) if base is not None else None
        proof = prove_base(hub, given, reference, local=local, progress=progress)
        made = _make_files(hub, given, repo_id, path, proof, place, Path(folder))
        files = tuple(
            PushedFile(name, file.stat().st_size, _is_new(place, name, file))
            for name, file in made.items()
        )
        card = made[CARD_NAME].read_text("utf-8")
        sent = _Sent(place.head, committed=False, pull_request=None, tag=None)
        if not dry_run:
            sent = _send(
                hub,
                repo_id,
                place,
                {file.path: made[file.path] for file in files if file.changed},
                message=commit_message or f"Push {path} with sparsedelta",
                description=commit_description,
                create_pr=create_pr,
                private=private,
                tag=tag,
            )
    url = f"{without_password(hub.endpoint)}/{repo_id}"
    return PushReport(repo_id, url, *sent, proof.record.base, proof.how, files, card, dry_run)


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
            f"a pull request is made to {MAIN!r}; leave the revision {revision!r} away, or do not ask"
            " for a pull request"
        )


def _recorded_base(delta: Delta, place: _Place, path: str) -> Reference | None:
    """Return the base that was proved when a delta on the same base was pushed to the same place."""
    repository = place.repository
    if repository is None or path not in repository.files:
        return None
    record = read_record(repository, path)
    if record is None or record.fingerprint != delta.base_fingerprint.hex():
        return None
    return parse_base_id(record.base)


def _wanted_base(delta: Delta, base_id: str | None, recorded: Reference | None) -> Reference:
    """Return the base to prove: the one given, or known; at the commit it is known at, if it is."""
    known = [one for one in (parse_base_id(delta.base.id), recorded) if one is not None]
    if base_id is None:
        return known[0] if known else base_reference(delta, "the delta")
    given = parse_base_id(base_id)
    if given is None:
        raise ValueError(
            f"base_id {base_id!r} names no repository; write org/model or org/model@revision"
        )
    return next((one for one in known if one.is_pinned and one.at(None) == given), given)


def _find_place(hub: Hub, repo_id: str, branch: str, tag: str | None, *, create_pr: bool) -> _Place:
    refs = hub.refs(repo_id)
    if refs is None:
        if create_pr:
            raise RemoteNotFound(
                f"there is no repository '{repo_id}' to open a pull request on, or it is private;"
                " check the name, or log in with `hf auth login`"
            )
        return _Place(False, branch, None, {}, None)
    head = refs.branches.get(branch)
    if head is None and branch.startswith(PULL_REQUEST):
        head = hub.pin(Reference(repo_id, branch)).revision
    start = head or refs.branches.get(MAIN)
    if tag is not None and tag in refs.tags and refs.tags[tag] != head:
        raise RemoteConflict(
            f"repository '{repo_id}' has a tag {tag!r} already, at {refs.tags[tag][:12]}; choose"
            " another name"
        )
    pinned = Reference(repo_id, start)
    repository = Repository(hub, pinned, hub.files(pinned)) if start else None
    return _Place(True, branch, head, refs.tags, repository)


def _make_files(
    hub: Hub,
    delta: Delta,
    repo_id: str,
    path: str,
    proof: Proof,
    place: _Place,
    folder: Path,
) -> dict[str, Path]:
    """Return the files of the push by their paths in the repository, written into a folder."""
    pinned = dataclasses.replace(delta, base=dataclasses.replace(delta.base, id=proof.record.base))
    made = {path: folder / DELTA_NAME}
    pinned.save(made[path])
    found = inspect(made[path])
    contents = {record_path(path): render_record(proof.record)}
    shown = changed_grid(found)
    picture = path.removesuffix(DELTA_SUFFIX) + PICTURE_SUFFIX
    if shown is not None:
        contents[picture] = render_png(shown)
    config = _config(delta, proof)
    if config is not None:
        contents[path.removesuffix(DELTA_NAME) + CONFIG_NAME] = config
    facts = CardFacts(
        repo_id=repo_id,
        path=path,
        base=proof.base.reference,
        base_is_delta=proof.base.is_delta_repository,
        base_metadata=hub.metadata(proof.base.reference),
        found=found,
        file_bytes=made[path].stat().st_size,
        target_bytes=found.target_bytes + sum(file.n_bytes for file in found.side_files),
        picture=(picture, shown) if shown is not None else None,
        endpoint=without_password(hub.endpoint),
    )
    others = place.repository.files if place.repository else {}
    alone = all(not p.endswith(DELTA_SUFFIX) or p == path for p in others)
    contents[CARD_NAME] = renewed_card(_existing_card(place), facts, alone=alone).encode()
    for number, (name, content) in enumerate(contents.items()):
        made[name] = folder / f"file-{number}"
        made[name].write_bytes(content)
    return made


def _existing_card(place: _Place) -> str | None:
    repository = place.repository
    if repository is None or CARD_NAME not in repository.files:
        return None
    return repository.download_one(CARD_NAME).read_text("utf-8", "replace")


def _config(delta: Delta, proof: Proof) -> bytes | None:
    """Return the target's config.json, if it has one that is the delta's or the base's.

    The Hub counts downloads of it, and shows the kind of model by it.
    """
    for file in delta.target.side_files:
        if file.path == CONFIG_NAME and file.stored:
            return carried_content(delta, file, file.stored)
    base = proof.base
    place = base.delta_file().path.rpartition("/")[0] if base.is_delta_repository else ""
    path = f"{place}/{CONFIG_NAME}" if place else CONFIG_NAME
    return base.download_one(path).read_bytes() if path in base.files else None


def _is_new(place: _Place, path: str, file: Path) -> bool:
    there: RemoteFile | None = place.repository.files.get(path) if place.repository else None
    return there is None or not is_content(there, file)


def _send(
    hub: Hub,
    repo_id: str,
    place: _Place,
    changed: Mapping[str, Path],
    *,
    message: str,
    description: str | None,
    create_pr: bool,
    private: bool | None,
    tag: str | None,
) -> _Sent:
    """Make what does not exist yet, one commit of the changed files if there are any, and a tag."""
    from huggingface_hub import CommitOperationAdd

    commit = place.head or _make_branch(hub, repo_id, place, private)
    pull_request = None
    # One commit on the state that was looked at: all of it arrives or none, and nothing is undone.
    with told(Reference(repo_id, place.branch)):
        if changed:
            done = hub.api.create_commit(
                repo_id,
                [CommitOperationAdd(path, str(file)) for path, file in changed.items()],
                commit_message=message,
                commit_description=description,
                revision=place.branch,
                create_pr=create_pr,
                parent_commit=commit,
            )
            commit, pull_request = done.oid, done.pr_url if create_pr else None
        if tag is not None and commit is not None and place.tags.get(tag) != commit:
            hub.api.create_tag(repo_id, tag=tag, revision=commit)
    return _Sent(commit, bool(changed), pull_request, tag if commit else None)


def _make_branch(hub: Hub, repo_id: str, place: _Place, private: bool | None) -> str | None:
    """Make the repository or branch that is not there; return the commit to build on."""
    with told(Reference(repo_id)):
        if not place.exists:
            hub.api.create_repo(repo_id, private=private, exist_ok=True)
        if place.branch != MAIN:
            start = place.repository.reference.revision if place.repository else None
            hub.api.create_branch(repo_id, branch=place.branch, revision=start, exist_ok=True)
    refs = hub.refs(repo_id)
    return refs.branches.get(place.branch) if refs else None
