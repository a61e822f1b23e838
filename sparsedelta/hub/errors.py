"""What the Hub's client raises, told as one sentence with what to do; tokens never get into one."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from sparsedelta.errors import (
    AccessDenied,
    RemoteConflict,
    RemoteError,
    RemoteNotFound,
    SparseDeltaError,
    Unreachable,
)
from sparsedelta.hub.references import Reference
from sparsedelta.hub.secrets import credentials
from sparsedelta.redaction import redacted

_MAX_SERVER_WORDS = 300
_LOG_IN = "log in with `hf auth login`, or give a token that may"


@contextmanager
def told(about: Reference) -> Iterator[None]:
    """Turn what the client raises about a repository into a ``RemoteError``, with one sentence.

    Errors that are not the network's pass: ours, wrong arguments, a full disk.
    """
    try:
        yield
    except (SparseDeltaError, KeyboardInterrupt):
        raise
    except Exception as error:
        known = explained(error, about)
        if known is None:
            raise
        raise known from error


def explained(error: BaseException, about: Reference) -> Exception | None:
    """Return the error to raise in place of one of the client's; None: it may pass as it is."""
    import huggingface_hub.errors as hf

    where = f"repository '{about.repo_id}'"
    if isinstance(error, hf.GatedRepoError):
        return AccessDenied(
            f"{where} is gated: ask for access, or accept its license, on its page on the Hub, and"
            f" {_LOG_IN} read it"
        )
    if isinstance(error, hf.RepositoryNotFoundError):
        return RemoteNotFound(
            f"there is no {where}, or it is private; check the name, or {_LOG_IN} read it",
            expected=about.repo_id,
        )
    if isinstance(error, hf.DisabledRepoError):
        return AccessDenied(f"{where} has been disabled by the Hub; it cannot be read")
    if isinstance(error, hf.RevisionNotFoundError):
        return RemoteNotFound(
            f"{where} has no revision {about.revision or 'main'!r}; it may have been deleted, or its"
            " history rewritten: look at its list of commits, and name another"
        )
    if isinstance(error, hf.RemoteEntryNotFoundError):
        return RemoteNotFound(f"{where} has no file {about.path or 'of that name'!r} at {about}")
    if isinstance(error, hf.HfHubHTTPError):
        return _by_status(error, where)
    if isinstance(error, hf.HFValidationError):
        return ValueError(f"{about.repo_id!r} is not the name of a repository; write org/name")
    if isinstance(error, json.JSONDecodeError):
        return Unreachable(
            f"the answer about {where} is not the Hub's (it is no JSON); is there a login page of this"
            " network, or a wrong HF_ENDPOINT? check the connection and run this again"
        )
    if isinstance(error, hf.LocalTokenNotFoundError):
        return AccessDenied(f"no token is known; {_LOG_IN} use {where}")
    return _of_the_connection(error, about)


def _of_the_connection(error: BaseException, about: Reference) -> Exception | None:
    import huggingface_hub.errors as hf

    # httpx or httpx2, whichever the client uses: its own errors say.
    httpx: Any = import_module(hf.HfHubHTTPError.__bases__[0].__module__.partition(".")[0])
    cause = error.__cause__
    if isinstance(error, hf.OfflineModeIsEnabled) or isinstance(cause, hf.OfflineModeIsEnabled):
        return not_cached(about)
    wrappers = (hf.LocalEntryNotFoundError, hf.RevisionResolutionError, RuntimeError)
    known = explained(cause, about) if isinstance(error, wrappers) and cause else None
    if known is not None:
        return known
    if isinstance(error, httpx.ConnectError | httpx.ProxyError):
        return Unreachable(
            f"the Hub cannot be reached for repository '{about.repo_id}': {_said(error)}; check the"
            " connection and run this again"
        )
    cut = isinstance(error, OSError) and "Consistency check failed" in str(error)
    if cut or isinstance(error, httpx.HTTPError | hf.XetDownloadError | RuntimeError):
        return Unreachable(
            f"the transfer from or to repository '{about.repo_id}' broke off: {_said(error)}; run"
            " this again, files that are complete are not transferred again"
        )
    if isinstance(error, hf.LocalEntryNotFoundError | hf.RevisionResolutionError):
        return not_cached(about)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _no_room(error)
    return None


def not_cached(about: Reference) -> Unreachable:
    """Return the error of something that is wanted offline and was never downloaded."""
    return Unreachable(
        f"{about} is not, or not wholly, in the local cache, and the Hub cannot be asked (offline);"
        " run this once with a connection"
    )


def _no_room(error: OSError) -> OSError:
    from huggingface_hub import constants

    return OSError(
        error.errno,
        "no space left for downloads; make room, or move the cache of the Hub to a larger disk",
        constants.HF_HUB_CACHE,
    )


def _by_status(error: Exception, where: str) -> RemoteError:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", 0)
    words = _shown(error, str(getattr(error, "server_message", "") or ""))
    said = f" ({words})" if words else ""
    if status == 401:
        return AccessDenied(f"the Hub does not accept the token{said}; {_LOG_IN} use {where}")
    if status == 403:
        return AccessDenied(
            f"the token may not do this with {where}{said}; use one with write access, or a name"
            " that is yours"
        )
    if status == 412:
        return RemoteConflict(
            f"somebody else changed {where} in the meantime{said}; nothing was written: run this"
            " again to build on the newest state"
        )
    if status == 409:
        return RemoteConflict(f"{where} already has that{said}; choose another name")
    if status == 429:
        return Unreachable(
            f"the Hub takes no more requests for now{said}; wait a few minutes and run this again,"
            " files that are complete are not transferred again"
        )
    if status >= 500:
        return Unreachable(
            f"the Hub is in trouble (HTTP {status}) over {where}{said}; run this again later, files"
            " that are complete are not transferred again"
        )
    return RemoteError(f"the Hub refused a request about {where}: HTTP {status}{said}")


def _said(error: BaseException) -> str:
    return _shown(error, str(error)).rstrip(".") or type(error).__name__


def _shown(error: BaseException, text: str) -> str:
    """Return the beginning of what a server or a client said, in one line and without credentials."""
    return " ".join(redacted(text, credentials(error)).split())[:_MAX_SERVER_WORDS]
