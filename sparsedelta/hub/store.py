"""A folder of a repository on the Hub as a store of objects. Each write is one commit.

A commit names its parent. The Hub refuses the commit if the parent is no longer the newest of the branch.
"""

from __future__ import annotations

import os
import random
import time
from typing import TYPE_CHECKING

from sparsedelta.errors import LimitExceeded, RemoteConflict, RemoteError, RemoteNotFound
from sparsedelta.hub.client import Hub, RemoteFile, Token
from sparsedelta.hub.errors import remote_errors
from sparsedelta.hub.references import Reference, parse_reference
from sparsedelta.stores.base import ByteSource
from sparsedelta.stores.failures import read_only
from sparsedelta.stores.names import check_name, is_name
from sparsedelta.stores.objects import Content

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

_MAIN = "main"
_TRIES = 30
_MAX_WAIT_SECONDS = 2.0


class HubStore:
    """Files of a model repository; implements ``sparsedelta.stores.objects.ObjectStore``.

    Args:
        url: ``hf://org/name/path``, or ``hf://org/name/path@branch``. The repository must exist. A tag or commit
            in place of the branch can only be read.
        token: token of the Hub; None: the token of the user who is logged in.

    Raises:
        ValueError: the address names no repository.
    """

    def __init__(self, url: str, *, token: Token = None) -> None:
        reference = parse_reference(url)
        if reference is None:
            raise ValueError(f"{url!r} is not a repository; write hf://org/name/path")
        self._hub = Hub(token, cached_listing=False)
        self._branch = Reference(reference.repo_id, reference.revision or _MAIN)
        self._folder = f"{reference.path}/" if reference.path else ""
        self.name = str(reference)
        self.writable = self._hub.has_token and not reference.is_pinned
        self.has_create = self.writable

    def read(self, name: str, max_bytes: int) -> bytes | None:
        """Return the content of an object, at most ``max_bytes`` bytes; None if it does not exist."""
        try:
            found = self._hub.read(self._branch, self._path(name), 0, max_bytes + 1)
        except RemoteError as error:
            if _is_absent(error):
                return None
            if _status(error) == 416:  # an empty object has no first byte
                return b""
            raise
        if len(found) > max_bytes:
            raise LimitExceeded(
                f"object '{self.name}/{name}' has more than {max_bytes} bytes, which is the limit"
            )
        return found

    def open(self, name: str) -> ByteSource | None:
        """Return an object to read by range; None if it does not exist."""
        head = self._head()
        file = self._file(head, self._path(name))
        return None if file is None else self._hub.source(head, file)

    def create(self, name: str, content: Content) -> bool:
        """Write an object if none has this name; return whether it was written."""
        return self._commit(name, content, replace=False)

    def write(self, name: str, content: Content) -> None:
        """Write an object. An object with this name is replaced."""
        self._commit(name, content, replace=True)

    def delete(self, name: str) -> None:
        """Remove an object if it exists. Its content stays in the history of the repository."""
        self._commit(name, None, replace=True)

    def list(self, prefix: str) -> list[str]:
        """Return the names that begin with ``prefix``, sorted."""
        folder = (self._folder + prefix).rpartition("/")[0]
        head = self._head()
        with remote_errors(head):
            try:
                found = self._hub.ask(
                    lambda: [
                        *self._hub.api.list_repo_tree(
                            head.repo_id, folder or None, recursive=True, revision=head.revision
                        )
                    ]
                )
            except Exception as error:
                if _is_absent(error):
                    return []
                raise
        paths = (entry.path for entry in found if hasattr(entry, "blob_id"))
        names = (p.removeprefix(self._folder) for p in paths if p.startswith(self._folder))
        return sorted(name for name in names if name.startswith(prefix) and is_name(name))

    def close(self) -> None:
        """Do nothing: no connection is held open."""

    def _path(self, name: str) -> str:
        return self._folder + check_name(name)

    def _head(self) -> Reference:
        """Return the branch at its newest commit, which is requested from the Hub."""
        if self._branch.is_pinned:
            return self._branch
        refs = self._hub.refs(self._branch.repo_id)
        if refs is None:
            raise RemoteNotFound(
                f"there is no repository '{self._branch.repo_id}', or it is private; create it with"
                " `hf repo create`, or log in with `hf auth login`"
            )
        names = {**refs.tags, **refs.branches}
        if self._branch.revision not in names:
            raise RemoteNotFound(
                f"repository '{self._branch.repo_id}' has no branch {self._branch.revision!r}; create it first"
            )
        return self._branch.at(names[str(self._branch.revision)])

    def _file(self, head: Reference, path: str) -> RemoteFile | None:
        with remote_errors(head):
            found = self._hub.ask(
                lambda: self._hub.api.get_paths_info(head.repo_id, [path], revision=head.revision)
            )
        return next(
            (RemoteFile(path, one.size, None, None) for one in found if hasattr(one, "size")), None
        )

    def _commit(self, name: str, content: Content | None, *, replace: bool) -> bool:
        """Write or remove an object in one commit; return False if it exists and ``replace`` is false."""
        if not self.writable:
            raise read_only(
                self.name,
                "it is a commit, which never changes, or you are not logged in; use a branch, and"
                " log in with `hf auth login`",
            )
        path = self._path(name)
        operation = _operation(path, content)
        for number in range(_TRIES):
            head = self._head()
            exists = (not replace or content is None) and self._file(head, path) is not None
            if exists and not replace:
                return False
            if content is None and not exists:
                return True
            try:
                with remote_errors(self._branch):
                    self._hub.api.create_commit(
                        head.repo_id,
                        [operation],
                        commit_message=f"{'Delete' if content is None else 'Write'} {path}",
                        revision=self._branch.revision,
                        parent_commit=head.revision,
                    )
                return True
            except RemoteConflict:  # someone else has committed, perhaps another object
                time.sleep(random.uniform(0, min(_MAX_WAIT_SECONDS, 0.05 * 2**number)))
        raise RemoteConflict(
            f"'{self.name}' was changed by others during each of {_TRIES} tries to write {name!r}; try again later"
        )


def _operation(path: str, content: Content | None) -> CommitOperationAdd | CommitOperationDelete:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    if content is None:
        return CommitOperationDelete(path)
    return CommitOperationAdd(path, content if isinstance(content, bytes) else os.fspath(content))


def _is_absent(error: BaseException) -> bool:
    """Return whether the Hub said that a repository has no such file or folder."""
    from huggingface_hub.errors import RemoteEntryNotFoundError

    return isinstance(error, RemoteEntryNotFoundError) or isinstance(
        error.__cause__, RemoteEntryNotFoundError
    )


def _status(error: BaseException) -> int:
    return int(getattr(getattr(error.__cause__, "response", None), "status_code", 0))
