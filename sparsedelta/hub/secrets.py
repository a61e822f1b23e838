"""Credentials found in a delta before it is pushed, and those in the requests to the Hub."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from urllib.parse import unquote, urlsplit

from sparsedelta.files.side_files import carried_content
from sparsedelta.format.delta import Delta
from sparsedelta.format.manifest import read_text
from sparsedelta.redaction import find_secret
from sparsedelta.report.text import printable


def check_secrets(delta: Delta) -> None:
    """Check that a delta holds nothing that looks like a credential: in its files, headers, info and base id.

    Raises:
        ValueError: it holds one. The message names its place and kind, but does not show the credential.
    """
    found = next(_secrets(delta), None)
    if found:
        where, kind = found
        raise ValueError(
            f"{where} holds what looks like {kind}, and everybody can read a public repository; make the"
            " delta again without it and revoke it if others have seen it, or push anyway"
            " (allow_secrets=True, --allow-secrets)"
        )


def _secrets(delta: Delta) -> Iterator[tuple[str, str]]:
    """Yield the place and the kind of each text that looks like a credential."""
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
            yield f"the delta's info, member {printable(repr(name[:80]))},", found[0]
    if delta.base.id and (found := find_secret(delta.base.id.encode())):
        yield "the name of the base (base_id)", found[0]


def _json(value: object) -> bytes:
    """Return a value as JSON in which real line ends replace the escaped ones, as in a private key."""
    return json.dumps(value, ensure_ascii=False).replace("\\n", "\n").encode("utf-8", "replace")


def credentials(error: BaseException) -> set[str]:
    """Return the credentials in the requests of an error and its causes, and in the environment.

    A server may repeat them in any answer. Environment variables: ``HF_ENDPOINT`` (a password in the
    address), ``HF_TOKEN`` and ``HUGGING_FACE_HUB_TOKEN``.
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
            except RuntimeError:  # httpx raises this if there is no request
                request = None
            sent = getattr(request, "headers", {}).get("authorization", "")
            found.add(sent.rpartition(" ")[2])
    found |= {os.environ.get(name, "") for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")}
    return {secret for secret in found if len(secret) >= 6}


def _of_address(address: str) -> set[str]:
    """Return the password in an address, as written and with percent escapes decoded."""
    try:
        password = urlsplit(address).password or ""
    except ValueError:
        return set()
    return {password, unquote(password)}
