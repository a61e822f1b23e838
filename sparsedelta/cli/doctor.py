"""``sparsedelta doctor``: what a bug report should say about this machine."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import click

import sparsedelta
from sparsedelta.cli._common import examples, json_option, print_json
from sparsedelta.cli._help import Command
from sparsedelta.codecs.kernels import in_use

if TYPE_CHECKING:
    from sparsedelta._typing import JSON

_PACKAGES = (
    "numpy", "zstandard", "blake3", "click", "rich", "safetensors", "torch", "transformers", "accelerate",
    "huggingface_hub", "fsspec", "s3fs", "gcsfs", "adlfs", "xxhash", "pyyaml", "matplotlib",
)  # fmt: skip


@click.command("doctor", cls=Command, epilog=examples("sparsedelta doctor"))
@json_option
def command(*, as_json: bool) -> None:
    """Show what a bug report should say about this machine.

    These are versions, kernels, GPUs, the login to the Hub and the cache. The output holds no
    token, and nothing is sent.
    """
    found = _findings()
    if as_json:
        print_json(found)
        return
    for title, value in found.items():
        click.echo(_line(title, value))


def _findings() -> dict[str, JSON]:
    from sparsedelta.hub.account import account
    from sparsedelta.live.devices import accelerators

    hub = account()
    gpus = accelerators()
    return {
        "sparsedelta": sparsedelta.__version__,
        "location": str(Path(sparsedelta.__file__).parent),
        "kernels": in_use(),
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": platform.platform(),
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "gpus": None if gpus is None else [*gpus],
        "packages": {name: _version(name) for name in _PACKAGES},
        "hub": None
        if hub is None
        else {
            "endpoint": hub.endpoint,
            "offline": hub.offline,
            "login": hub.login,
            "cache": hub.cache,
            "cache_free_bytes": _free_bytes(Path(hub.cache)),
        },
        "temporary_folder": tempfile.gettempdir(),
        "temporary_free_bytes": _free_bytes(Path(tempfile.gettempdir())),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _free_bytes(path: Path) -> int:
    """Return the free space of the file system on which a path is, or will be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _line(title: str, value: JSON) -> str:
    """Return a finding as text: one line, or one for each member."""
    from sparsedelta.report.text import printable, size

    if isinstance(value, dict):
        return "\n".join(_line(f"{title} {name}", inner) for name, inner in value.items())
    if title.endswith("_bytes") and isinstance(value, int):
        return f"{title.removesuffix('_bytes').replace('_', ' '):24}{size(value)}"
    if value is None:
        text = "no" if title == "hub login" else "not installed"
        text = "unknown, torch is not installed" if title == "gpus" else text
    elif isinstance(value, bool):
        text = "yes" if value else "no"
    elif isinstance(value, list):
        text = "; ".join(map(str, value)) or "none"
    else:
        text = printable(str(value))
    return f"{title.replace('_', ' ').replace('packages ', ''):24}{text}"
