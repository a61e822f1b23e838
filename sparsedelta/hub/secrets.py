"""Credentials, told by their form: found in a delta before it is pushed, and kept out of what is shown.

Each form has its own prefix, length and characters, so that vocabularies and random text hold none.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from sparsedelta.files.side_files import carried_content
from sparsedelta.format.delta import Delta
from sparsedelta.format.manifest import read_text
from sparsedelta.report.text import printable

# Around a token: no other character of one, and not the number that follows an entry of a vocabulary.
_START = r"(?<![A-Za-z0-9_+-])"
_END = r"""(?![A-Za-z0-9_+-])(?!["'] ?[:,] ?-?[0-9])"""
_VALUE = r"""["']?\s?[=:]\s?["']?"""


class _Form(NamedTuple):
    kind: str
    parts: tuple[str, ...]  # in lower case; whatever has the form holds one of them
    pattern: str


_FORMS = (
    _Form("a Hugging Face token", ("hf_", "api_org_"), r"(?:hf|api_org)_[A-Za-z0-9]{20,60}"),
    _Form("a GitHub token", ("gh",), r"gh[pousr]_[A-Za-z0-9]{36,255}"),
    _Form("a GitHub token", ("github_pat_",), r"github_pat_[A-Za-z0-9_]{22,255}"),
    _Form("a GitLab token", ("glpat-",), r"glpat-[A-Za-z0-9_.-]{20,300}"),
    _Form("an AWS access key", ("akia", "asia"), r"(?:AKIA|ASIA)[A-Z0-9]{16}"),
    _Form("a Slack token", ("xox",), r"xox[abeoprs]-(?=[A-Za-z-]*[0-9])[A-Za-z0-9-]{10,300}"),
    _Form("a Google API key", ("aiza",), r"AIza[A-Za-z0-9_-]{35}"),
    _Form(
        "an API key",
        ("sk-",),
        r"sk-(?:(?:proj|svcacct|admin|ant|or|lf)-[A-Za-z0-9_-]{20,300}"
        r"|(?=[A-Za-z]*[0-9])(?=[0-9A-Z]*[a-z])[A-Za-z0-9]{20,300})",
    ),
)
_WHOLE_FORMS = (
    _Form(
        "a private key",
        ("private key",),
        r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----",
    ),
    _Form(
        "an AWS secret key",
        ("aws_secret_access_key",),
        rf"(?i:aws_secret_access_key){_VALUE}[A-Za-z0-9/+=]{{16,}}",
    ),
    _Form(
        "an address with a password",
        ("://",),
        r"""(?<![A-Za-z0-9+.-])[A-Za-z][A-Za-z0-9+.-]{1,15}://[^\s/:@"'<>{}$*\\]{0,80}:[^\s/:@"'<>{}$*\\]{3,200}@[A-Za-z0-9\[]""",
    ),
    _Form(
        "a login of .netrc",
        ("machine",),
        r"(?<!\w)machine\s+[\w.-]+\s+login\s+\S+\s+(?:account\s+\S+\s+)?password\s+\S+",
    ),
    _Form(
        "a variable with a secret",
        ("_token", "_key", "_secret", "_password"),
        r"(?<![A-Za-z0-9_])[A-Z][A-Z0-9_]{0,60}_(?:TOKEN|KEY|SECRET|PASSWORD)"
        rf"{_VALUE}(?=[A-Za-z_.+/-]*[0-9])[A-Za-z0-9_.+/-]{{16,200}}(?![A-Za-z0-9_.+/(\[-])",
    ),
)
_ALL = (
    *(form._replace(pattern=f"{_START}{form.pattern}{_END}") for form in _FORMS),
    *_WHOLE_FORMS,
)
_FINDERS = [
    (form.kind, [part.encode() for part in form.parts], re.compile(form.pattern.encode()))
    for form in _ALL
]
# Looser than the forms: what is hidden by mistake does no harm.
_HIDDEN = re.compile(
    "|".join([*(form.pattern for form in _ALL), r"hf_[A-Za-z0-9_]+", r"(?i:bearer)\s+\S{6,}"])
)
_USER = re.compile(r"(?<=://)[^\s/@\"'<>]+@")


def find_secret(content: bytes) -> tuple[str, int] | None:
    """Return the kind of credential that a text holds, and in which line; None if it seems to hold none."""
    lowered = content.lower()
    for kind, parts, pattern in _FINDERS:
        if any(part in lowered for part in parts) and (match := pattern.search(content)):
            return kind, 1 + content.count(b"\n", 0, match.start())
    return None


def check_secrets(delta: Delta) -> None:
    """Check that a delta holds nothing that looks like a credential in what it carries beside tensors.

    Raises:
        ValueError: it does; the message says where and what kind, and does not repeat it.
    """
    found = next(_secrets(delta), None)
    if found:
        where, kind = found
        raise ValueError(
            f"{where} holds what looks like {kind}, and would be public in a public repository; make"
            " the delta again without it (and revoke it if others have seen it), or push it all the"
            " same (allow_secrets=True, --allow-secrets)"
        )


def _secrets(delta: Delta) -> Iterator[tuple[str, str]]:
    """Yield where something looks like a credential, and what kind."""
    for side_file in delta.target.side_files:
        if side_file.stored:
            found = find_secret(carried_content(delta, side_file, side_file.stored))
            if found:
                kind, line = found
                yield f"file {printable(repr(side_file.path))}, line {line},", kind
    for weight_file in delta.target.weight_files:
        stored = weight_file.stored
        if stored:
            coded = delta.payload.read(stored.offset, stored.stored_bytes)
            content = read_text(coded, stored.n_bytes)
        else:
            content = _json(weight_file.metadata)
        if found := find_secret(content):
            yield f"the header of {printable(repr(weight_file.path))}", found[0]
    for name, value in delta.info.items():
        if found := find_secret(_json({name: value})):
            yield f"what the delta records (info), member {printable(repr(name[:80]))},", found[0]
    if delta.base.id and (found := find_secret(delta.base.id.encode())):
        yield "the name of the base (base_id)", found[0]


def _json(value: object) -> bytes:
    """Return a value as JSON with its escaped line ends as such, as private keys have them."""
    return json.dumps(value, ensure_ascii=False).replace("\\n", "\n").encode("utf-8", "replace")


def redacted(text: str, known: Iterable[str] = ()) -> str:
    """Return a text without anything in it that looks like a credential, or is one of the known ones."""
    for secret in sorted(known, key=len, reverse=True):
        text = text.replace(secret, "[token]")
    return _HIDDEN.sub("[token]", _USER.sub("[password]@", text))


def credentials(error: BaseException) -> set[str]:
    """Return the credentials that the requests of an error and of its causes were made with.

    A server may repeat them in any answer. Those of ``HF_ENDPOINT`` are among them.
    """
    found = _of_address(os.environ.get("HF_ENDPOINT", ""))
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        one = pending.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        pending += [one.__cause__, one.__context__]
        for holder in (one, getattr(one, "response", None)):
            try:
                request = getattr(holder, "request", None)
            except RuntimeError:  # httpx: it has none
                request = None
            sent = getattr(request, "headers", {}).get("authorization", "")
            found.add(sent.rpartition(" ")[2])
    found |= {os.environ.get(name, "") for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")}
    return {secret for secret in found if len(secret) >= 6}


def _of_address(address: str) -> set[str]:
    """Return the password of an address, as it stands there and as it is meant."""
    try:
        password = urlsplit(address).password or ""
    except ValueError:
        return set()
    return {password, unquote(password)}


def without_password(address: str) -> str:
    """Return an address as it may be shown."""
    return _USER.sub("", address)
