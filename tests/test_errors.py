"""The exception tree: stable codes, and errors that carry what they are about."""

from __future__ import annotations

import inspect

import pytest

from sparsedelta import errors
from sparsedelta.errors import BaseMismatch, SparseDeltaError

CODES = {
    "AccessDenied": "access_denied",
    "AlreadyApplied": "already_applied",
    "BadMagic": "bad_magic",
    "BadVersion": "bad_version",
    "BaseMismatch": "base_mismatch",
    "BaseNeeded": "base_needed",
    "Behind": "behind",
    "ChannelError": "channel",
    "CheckpointError": "checkpoint",
    "ConflictError": "conflict",
    "Corrupt": "corrupt",
    "FormatError": "format",
    "HeadMoved": "head_moved",
    "LimitExceeded": "limit_exceeded",
    "LossyConversion": "lossy_conversion",
    "MismatchError": "mismatch",
    "PartlyApplied": "partly_applied",
    "RemoteConflict": "remote_conflict",
    "RemoteError": "remote",
    "RemoteNotFound": "remote_not_found",
    "SparseDeltaError": "error",
    "StructureMismatch": "structure_mismatch",
    "TargetMismatch": "target_mismatch",
    "Truncated": "truncated",
    "Uncertain": "uncertain",
    "Unreachable": "unreachable",
    "UnsupportedFeature": "unsupported_feature",
    "UnsupportedVersion": "unsupported_version",
}
TREE: dict[str, type[SparseDeltaError]] = dict(inspect.getmembers(errors, inspect.isclass))


def test_codes_are_stable() -> None:
    assert {name: kind.code for name, kind in TREE.items()} == CODES


@pytest.mark.parametrize("name", sorted(CODES.keys() - {"SparseDeltaError"}))
def test_every_error_is_ours(name: str) -> None:
    assert issubclass(TREE[name], SparseDeltaError)
    assert issubclass(TREE[name], ValueError) != issubclass(TREE[name], errors.RemoteError)


def test_docstring_draws_the_tree() -> None:
    drawn = (errors.__doc__ or "").splitlines()
    for name, kind in TREE.items():
        line = next(line for line in drawn if name in line.split())
        depth = sum(issubclass(parent, SparseDeltaError) for parent in kind.__mro__) - 1
        assert line.index(name) == 3 * depth, line


def test_attributes() -> None:
    error = BaseMismatch("tensor 'w' differs", tensor="w", expected="00", found="01")
    assert str(error) == "tensor 'w' differs"
    assert (error.tensor, error.expected, error.found) == ("w", "00", "01")
    assert SparseDeltaError("what").tensor is None
