"""Errors of huggingface_hub as errors of this package: one sentence that says what to do, without tokens."""

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

_MAX_SERVER_CHARACTERS = 300
_LOG_IN = "log in with `hf auth login`, or give a token with the right to"


@contextmanager
def remote_errors(about: Reference) -> Iterator[None]:
    """Translate the client's errors about a repository into ``RemoteError``; see ``translated``.

    Other errors pass unchanged, such as those of this package.
    """
    try:
        yield
    except (SparseDeltaError, KeyboardInterrupt):
        raise
    except Exception as error:
        known = translated(error, about)
        if known is None:
            raise
        raise known from error


def translated(error: BaseException, about: Reference) -> Exception | None:
    """Return the error to raise in place of an error of the client; None: raise that error itself."""
    import huggingface_hub.errors as hf

    where = f"repository '{about.repo_id}'"
    if isinstance(error, hf.GatedRepoError):
        return AccessDenied(
            f"{where} is gated: ask for access or accept its license on its page on the Hub, and"
            f" {_LOG_IN} read it"
        )
    if isinstance(error, hf.RepositoryNotFoundError):
        return RemoteNotFound(
            f"there is no {where}, or it is private; check the name, or {_LOG_IN} read it",
            expected=about.repo_id,
        )
    if isinstance(error, hf.DisabledRepoError):
        return AccessDenied(f"the Hub has disabled {where}; it cannot be read")
    if isinstance(error, hf.RevisionNotFoundError):
        return RemoteNotFound(
            f"{where} has no revision {about.revision or 'main'!r}, which may have been deleted; choose"
            " another one from the repository's list of commits"
        )
    if isinstance(error, hf.RemoteEntryNotFoundError):
        return RemoteNotFound(f"{where} has no file {about.path or 'of that name'!r} at {about}")
    if isinstance(error, hf.HfHubHTTPError):
        return _by_status(error, where)
    if isinstance(error, hf.HFValidationError):
        return ValueError(f"{about.repo_id!r} is not the name of a repository; write org/name")
    if isinstance(error, json.JSONDecodeError):
        return Unreachable(
            f"the answer about {where} is not from the Hub (it is not JSON), but perhaps from a login page"
            " of this network; check the connection and HF_ENDPOINT, and run this again"
        )
    if isinstance(error, hf.LocalTokenNotFoundError):
        return AccessDenied(f"no access token is available; {_LOG_IN} use {where}")
    return _of_the_connection(error, about)


def _of_the_connection(error: BaseException, about: Reference) -> Exception | None:
    import huggingface_hub.errors as hf

    # The client uses httpx or httpx2; the base class of its error shows which.
    httpx: Any = import_module(hf.HfHubHTTPError.__bases__[0].__module__.partition(".")[0])
    cause = error.__cause__
    if isinstance(error, hf.OfflineModeIsEnabled) or isinstance(cause, hf.OfflineModeIsEnabled):
        return not_cached(about)
    wrappers = (hf.LocalEntryNotFoundError, hf.RevisionResolutionError, RuntimeError)
    known = translated(cause, about) if isinstance(error, wrappers) and cause else None
    if known is not None:
        return known
    if isinstance(error, httpx.ConnectError | httpx.ProxyError):
        return Unreachable(
            f"the Hub cannot be reached for repository '{about.repo_id}': {_message(error)}; check the"
            " connection and run this again"
        )
    cut = isinstance(error, OSError) and "Consistency check failed" in str(error)
    by_xet = isinstance(error, hf.XetDownloadError | ConnectionError)  # what its client raises
    if cut or by_xet or isinstance(error, httpx.HTTPError | RuntimeError):
        other_way = "; if it fails again, set HF_HUB_DISABLE_XET=1" if by_xet else ""
        return Unreachable(
            f"the transfer from or to repository '{about.repo_id}' broke off: {_message(error)}; run"
            f" this again, complete files are not transferred again{other_way}"
        )
    if isinstance(error, hf.LocalEntryNotFoundError | hf.RevisionResolutionError):
        return not_cached(about)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _disk_full(error)
    return None


def not_cached(about: Reference) -> Unreachable:
    """Return the error for a file or repository that is needed offline and is not in the cache."""
    return Unreachable(
        f"{about} is not in the local cache, or not completely, and the Hub cannot be reached (offline);"
        " run this once with a connection"
    )


def _disk_full(error: OSError) -> OSError:
    from huggingface_hub import constants

    return OSError(
        error.errno,
        "no space left for downloads; free some space, or move the cache of the Hub to a larger disk",
        constants.HF_HUB_CACHE,
    )


def _by_status(error: Exception, where: str) -> RemoteError:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", 0)
    text = _shown(error, str(getattr(error, "server_message", "") or ""))
    said = f" ({text})" if text else ""
    if status == 401:
        return AccessDenied(f"the Hub does not accept the token{said}; {_LOG_IN} use {where}")
    if status == 403:
        return AccessDenied(
            f"the token does not allow this for {where}{said}; use a token with write access, or a"
            " repository of your own"
        )
    if status == 412:
        return RemoteConflict(
            f"somebody else changed {where} in the meantime{said}; nothing was written: run this"
            " again to push to the newest commit"
        )
    if status == 409:
        return RemoteConflict(f"{where} already has this name{said}; choose another name")
    if status == 429:
        return Unreachable(
            f"the Hub accepts no more requests for now{said}; wait a few minutes and run this again,"
            " complete files are not transferred again"
        )
    if status >= 500:
        return Unreachable(
            f"the Hub failed with HTTP {status} for {where}{said}; run this again later, complete files"
            " are not transferred again"
        )
    return RemoteError(f"the Hub refused a request about {where}: HTTP {status}{said}")


def _message(error: BaseException) -> str:
    return _shown(error, str(error)).rstrip(".") or type(error).__name__


def _shown(error: BaseException, text: str) -> str:
    """Return the beginning of a message of the server or client, on one line and without credentials."""
    return " ".join(redacted(text, credentials(error)).split())[:_MAX_SERVER_CHARACTERS]
