"""The public names, pinned: one that goes, or comes, is a decision."""

from __future__ import annotations

import inspect
import re

import pytest

import sparsedelta

NAMES = {
    "Channel",
    "ConvertReport",
    "Delta",
    "DeltaBank",
    "Follower",
    "Inspection",
    "Publisher",
    "PullReport",
    "PushReport",
    "Snapshot",
    "SparseDeltaError",
    "VerifyReport",
    "__version__",
    "apply",
    "convert",
    "diff",
    "inspect",
    "invert",
    "load",
    "load_model",
    "merge",
    "read_mask",
    "stack",
    "pull",
    "push",
    "verify",
}


def test_names() -> None:
    assert set(sparsedelta.__all__) == NAMES
    assert len(sparsedelta.__all__) == len(NAMES)
    assert dir(sparsedelta) == sorted(NAMES)


@pytest.mark.parametrize("name", sorted(NAMES - {"__version__"}))
def test_every_name_is_there_and_described(name: str) -> None:
    value = getattr(sparsedelta, name)
    assert value is getattr(sparsedelta, name)
    assert value.__module__.startswith("sparsedelta.")
    assert inspect.getdoc(value)


def test_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", sparsedelta.__version__)


def test_no_other_name() -> None:
    with pytest.raises(AttributeError, match="module 'sparsedelta' has no attribute 'patch'"):
        sparsedelta.patch  # noqa: B018


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        (
            "diff",
            "base target * base_id values level standalone exclude include strict info progress spool_dir executor",
        ),
        ("apply", "base delta out * verify overwrite exclude any_size durable progress executor"),
        ("verify", "delta * base target exclude progress executor"),
        ("load", "path * any_size"),
        ("stack", "deltas * base progress spool_dir"),
        ("invert", "delta * base base_id exclude progress spool_dir"),
    ],
)
def test_parameters(name: str, parameters: str) -> None:
    found: list[str] = []
    for parameter in inspect.signature(getattr(sparsedelta, name)).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in found:
            found.append("*")
        found.append(parameter.name)
    assert " ".join(found) == parameters
