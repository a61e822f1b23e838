"""What a form of delta can hold. The checks before writing and the table in docs/interop.md come from here."""

from __future__ import annotations

from dataclasses import dataclass

FLOATS = frozenset({"F16", "BF16", "F32"})


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a form can hold, and what its files prove.

    Attributes:
        dtypes: dtypes of the tensors that may change; None for all.
        signed_zero, nan: whether a change to or from −0, or to a NaN, can be written.
        additive: the form holds differences of floating-point numbers, so that some targets have none.
        structure: whether tensors may be added, removed or resized.
        files: whether side files and headers may differ from the base's.
        proof: what the digests in a file prove about the target: "none", "changed tensors" or "all tensors".
    """

    dtypes: frozenset[str] | None = None
    signed_zero: bool = True
    nan: bool = True
    additive: bool = False
    structure: bool = False
    files: bool = False
    proof: str = "none"
