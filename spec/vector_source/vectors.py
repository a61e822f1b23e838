"""What a vector is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vector_source.checkpoints import Checkpoint, Tensor
from vector_source.writer import assemble, draft


@dataclass(frozen=True)
class Valid:
    """A valid vector. With `zeros` the base is one file of one tensor of zeros, not stored."""

    name: str
    shows: str
    base: Checkpoint
    target: Checkpoint
    delta: bytes
    zeros: Tensor | None = None


@dataclass(frozen=True)
class Invalid:
    """An invalid vector. With `on_apply` it is refused when it is applied, or when it is read.

    It breaks the rule `breaks` and so has `code`. Where it cannot break that rule alone, `also` are
    the codes of the others.
    """

    name: str
    why: str
    breaks: str
    code: str
    delta: bytes
    on_apply: bool = False
    also: tuple[str, ...] = ()


def vector(
    name: str, shows: str, base: Checkpoint, target: Checkpoint, *codings: Any, **options: Any
) -> Valid:
    """Return a vector whose delta is the writer's plain one."""
    return Valid(name, shows, base, target, assemble(draft(base, target, *codings, **options)))
