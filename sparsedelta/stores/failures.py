"""What a store that is reached through a network raises, as one sentence; credentials never get into one."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from sparsedelta.errors import AccessDenied, RemoteError, SparseDeltaError, Unreachable
from sparsedelta.redaction import redacted

_MAX_WORDS = 300
_REFUSED = (errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.EMSGSIZE, errno.ENAMETOOLONG)
# Faults of a program, which are no answer of a store.
_FAULTS = (TypeError, AttributeError, NameError, LookupError, AssertionError)


@contextmanager
def remote_errors(store: str) -> Iterator[None]:
    """Turn what a client raises into a ``RemoteError``; "not found" and "exists" pass."""
    try:
        yield
    except (SparseDeltaError, FileNotFoundError, FileExistsError, *_FAULTS):
        raise
    except Exception as error:
        raise translated(error, store) from error


def translated(error: Exception, store: str) -> RemoteError:
    """Return the error to raise in place of one of a client."""
    said = str(getattr(error, "strerror", None) or error)
    words = " ".join(redacted(said).split())[:_MAX_WORDS].rstrip(".") or type(error).__name__
    if isinstance(error, PermissionError) or "Credential" in type(error).__name__:
        return AccessDenied(
            f"'{store}' does not let you do this: {words}; check the credentials and what they may do"
        )
    if isinstance(error, OSError) and error.errno in _REFUSED:
        return RemoteError(f"'{store}' refused a request: {words}")
    return unreachable(store, words)


def unreachable(store: str, words: str) -> Unreachable:
    """Return the error of a store that gave no answer, or half of one."""
    return Unreachable(
        f"'{store}' cannot be reached, or the transfer broke off: {words}; check the connection and"
        " try again"
    )


def read_only(store: str, why: str) -> AccessDenied:
    """Return the error of a store that cannot be written to."""
    return AccessDenied(f"'{store}' can only be read: {why}")
