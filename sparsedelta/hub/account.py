"""What this machine knows of the Hub: address, login and cache. No request is sent, and no token is returned."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Account:
    """The settings of huggingface_hub.

    Attributes:
        endpoint: address of the Hub.
        offline: whether requests are switched off (``HF_HUB_OFFLINE``).
        login: where the token comes from: the environment, the file of ``hf auth login``, or None if there is none.
        cache: folder of the downloaded files; it may not exist yet.
    """

    endpoint: str
    offline: bool
    login: Literal["environment", "file"] | None
    cache: str


def account() -> Account | None:
    """Return the settings, or None if huggingface_hub is not installed."""
    try:
        from huggingface_hub import constants, get_token
    except ImportError:
        return None
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    in_environment = any(os.environ.get(name, "").strip() for name in names)
    return Account(
        endpoint=constants.ENDPOINT,
        offline=constants.HF_HUB_OFFLINE,
        login="environment" if in_environment else "file" if get_token() else None,
        cache=constants.HF_HUB_CACHE,
    )
