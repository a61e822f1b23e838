"""Errors of stores on a network. The message is one sentence and never contains credentials."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from sparsedelta.errors import AccessDenied, RemoteError, SparseDeltaError, Unreachable
from sparsedelta.redaction import redacted

_MAX_WORDS = 300
_REFUSED = (errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.EMSGSIZE, errno.ENAMETOOLONG)
# Errors in code, which do not come from the store.
_FAULTS = (TypeError, AttributeError, NameError, LookupError, AssertionError)


@contextmanager
def remote_errors(store: str) -> Iterator[None]:
    """Raise errors of a client library as ``RemoteError``; "not found" and "exists" pass through."""
    try:
        yield
    except (SparseDeltaError, FileNotFoundError, FileExistsError, *_FAULTS):
        raise
    except Exception as error:
        raise translated(error, store) from error


def translated(error: Exception, store: str) -> RemoteError:
    """Return the error to raise instead of an error of a client library."""
    said = str(getattr(error, "strerror", None) or error)
    words = " ".join(redacted(said).split())[:_MAX_WORDS].rstrip(".") or type(error).__name__
    if isinstance(error, PermissionError) or "Credential" in type(error).__name__:
        return AccessDenied(
            f"'{store}' does not let you do this: {words}; check the credentials and their permissions"
        )
    if isinstance(error, OSError) and error.errno in _REFUSED:
        return RemoteError(f"'{store}' refused a request: {words}")
    return unreachable(store, words)


def unreachable(store: str, words: str) -> Unreachable:
    """Return the error for a store that gave no answer or an incomplete answer."""
    return Unreachable(
        f"'{store}' cannot be reached, or the transfer was interrupted: {words}; check the connection and"
        " try again"
    )


def read_only(store: str, why: str) -> AccessDenied:
    """Return the error for a store that can only be read."""
    return AccessDenied(f"'{store}' can only be read: {why}")
