"""Credentials recognised by their form: found in a text, and removed from messages.

Each form has a prefix, a length and a set of characters that vocabularies and random text do not match.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

# A token has no letters or digits directly before or after it. In a vocabulary, an entry is followed by its number;
# such a match does not count.
_START = r"(?<![A-Za-z0-9_+-])"
_END = r"""(?![A-Za-z0-9_+-])(?!["'] ?[:,] ?-?[0-9])"""
_VALUE = r"""["']?\s?[=:]\s?["']?"""


class _Form(NamedTuple):
    kind: str
    parts: tuple[str, ...]  # in lower case; every match contains one, which makes the search fast
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
_OTHER_FORMS = (
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
    *_OTHER_FORMS,
)
_FINDERS = [
    (form.kind, [part.encode() for part in form.parts], re.compile(form.pattern.encode()))
    for form in _ALL
]
# Matches more than the forms do, because a message may also lose harmless text.
_HIDDEN = re.compile(
    "|".join(
        [
            *(form.pattern for form in _ALL),
            r"hf_(?![a-z_]+\b)[A-Za-z0-9_]+",
            r"(?i:bearer)\s+\S{6,}",
        ]
    )
)
_USER = re.compile(r"(?<=://)[^\s/@\"'<>]+@")


def find_secret(content: bytes) -> tuple[str, int] | None:
    """Return the kind and the line of a credential in a text; None if none is found."""
    lowered = content.lower()
    for kind, parts, pattern in _FINDERS:
        if any(part in lowered for part in parts) and (match := pattern.search(content)):
            return kind, 1 + content.count(b"\n", 0, match.start())
    return None


def redacted(text: str, known: Iterable[str] = ()) -> str:
    """Return a text without the credentials in ``known``, all that match a form, and logins in addresses."""
    for secret in sorted(known, key=len, reverse=True):
        text = text.replace(secret, "[token]")
    return _HIDDEN.sub("[token]", _USER.sub("[password]@", text))


def without_password(address: str) -> str:
    """Return an address without user name and password."""
    return _USER.sub("", address)
