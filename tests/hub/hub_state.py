"""The state of the loopback Hub: repositories with commits, and files stored by content.

A repository is a list of commits. Each commit lists all its files. Branches, tags and pull requests are names
for commits. This module contains no HTTP code.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

EMPTY_COMMIT = "Initial commit"
LFS_BYTES = 10 << 20  # above this the Hub takes no file as a regular one


@dataclass(frozen=True)
class Blob:
    """A file's content and how it is stored."""

    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def git_oid(self) -> str:
        """Return the git object id of the content, or of its LFS pointer if the file is large."""
        stored = self.data
        if self.lfs:
            stored = (
                "version https://git-lfs.github.com/spec/v1\n"
                f"oid sha256:{self.sha256}\nsize {len(self.data)}\n"
            ).encode()
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid


@dataclass(frozen=True)
class Commit:
    """A commit of a repository."""

    oid: str
    files: Mapping[str, Blob]
    message: str
    description: str


@dataclass
class Repo:
    """A model repository. Its default branch ``main`` begins with a commit of one small file."""

    id: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pull_requests: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        attributes = Blob(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", lfs=False)
        self.branches["main"] = self._add({".gitattributes": attributes}, EMPTY_COMMIT, "")

    def find(self, revision: str) -> Commit | None:
        """Return the commit of a branch, tag, pull request or commit id, which may be shortened."""
        for names in (self.branches, self.tags, self.pull_requests):
            if revision in names:
                return self.commits[names[revision]]
        if len(revision) >= 7:
            for oid, commit in self.commits.items():
                if oid.startswith(revision):
                    return commit
        return None

    def commit(
        self, branch: str, changes: Mapping[str, Blob | None], message: str, description: str = ""
    ) -> Commit:
        """Add a commit to a branch or pull request. A file whose value is None is removed."""
        names = self.names(branch)
        oid = names[branch] = self._next(names[branch], changes, message, description)
        return self.commits[oid]

    def names(self, branch: str) -> dict[str, str]:
        """Return the mapping that holds the commit of a branch or pull request."""
        return self.pull_requests if branch.startswith("refs/pr/") else self.branches

    def open_pull_request(
        self, parent: str, changes: Mapping[str, Blob | None], message: str, description: str
    ) -> tuple[int, Commit]:
        """Open a pull request with one commit; return its number."""
        number = len(self.pull_requests) + 1
        oid = self._next(parent, changes, message, description)
        self.pull_requests[f"refs/pr/{number}"] = oid
        return number, self.commits[oid]

    def _next(
        self, parent: str, changes: Mapping[str, Blob | None], message: str, description: str
    ) -> str:
        files = {**self.commits[parent].files, **changes}
        kept = {path: blob for path, blob in files.items() if blob is not None}
        return self._add(kept, message, description)

    def _add(self, files: Mapping[str, Blob], message: str, description: str) -> str:
        seed = f"{self.id} {len(self.commits)} {message} {sorted(files)}"
        oid = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[oid] = Commit(oid, files, message, description)
        return oid


@dataclass
class State:
    """The whole state of a Hub.

    Attributes:
        repos: by id.
        users: user name by token; a user may write to the namespaces of its own name and ``"org"``.
        accepted: ids of gated repositories that every user has access to.
        stored: uploaded large files by SHA-256.
        moved: new id by old id.
    """

    repos: dict[str, Repo] = field(default_factory=dict)
    users: dict[str, str] = field(default_factory=dict)
    accepted: set[str] = field(default_factory=set)
    stored: dict[str, bytes] = field(default_factory=dict)
    moved: dict[str, str] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def add_repo(
        self,
        repo_id: str,
        files: Mapping[str, bytes],
        *,
        private: bool = False,
        gated: bool = False,
    ) -> Repo:
        """Make a repository with one commit of ``files`` on its default branch."""
        repo = self.repos[repo_id] = Repo(repo_id, private=private, gated=gated)
        if files:
            self.add_commit(repo_id, files)
        return repo

    def add_commit(self, repo_id: str, files: Mapping[str, bytes]) -> Commit:
        """Add files to the default branch."""
        blobs = {path: self.blob(data) for path, data in files.items()}
        return self.repos[repo_id].commit("main", blobs, "Add files")

    def head(self, repo_id: str) -> Commit:
        """Return the newest commit of the default branch."""
        repo = self.repos[repo_id]
        return repo.commits[repo.branches["main"]]

    def blob(self, data: bytes) -> Blob:
        """Return the stored form of a file: regular, or large."""
        blob = Blob(data, lfs=is_large(data[:512], len(data)))
        if blob.lfs:
            self.stored[blob.sha256] = data
        return blob


def is_large(sample: bytes, n_bytes: int) -> bool:
    """Return whether the Hub stores a file outside git: a large one, or one that is not text."""
    if n_bytes > LFS_BYTES or b"\0" in sample:
        return True
    try:
        sample.decode()
    except UnicodeDecodeError as error:
        return error.end < len(sample)  # the sample may end inside a character
    return False
