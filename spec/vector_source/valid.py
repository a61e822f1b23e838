"""The valid vectors: what each shows, its base, its target and its delta."""

from __future__ import annotations

from collections.abc import Callable

from vector_source import valid_codings, valid_files, valid_rows
from vector_source.checkpoints import WEIGHTS, folder, one_file, tensor
from vector_source.vectors import Valid, vector

__all__ = ["WEIGHTS", "Valid", "example", "folder", "valid_vectors"]


def example() -> list[Valid]:
    """Return the worked example of FORMAT §15: four values of 300 changed."""
    bits = [0x3F80] * 300
    bits[3], bits[290] = 0x8000, 0xBF80
    base = one_file({"w": tensor("BF16", bits)})
    for position, new in ((2, 0x3F81), (3, 0x0000), (289, 0x4080), (290, 0xBF82)):
        bits[position] = new
    shows = "the worked example of FORMAT \u00a715"
    return [vector("example", shows, base, one_file({"w": tensor("BF16", bits)}))]


SECTIONS: tuple[Callable[[], list[Valid]], ...] = (
    example,
    valid_codings.encodings,
    valid_codings.below_a_byte,
    valid_codings.large,
    valid_codings.codes,
    valid_codings.dtypes,
    valid_codings.padded,
    valid_rows.structure,
    valid_rows.sources,
    valid_files.files,
    valid_files.side_files,
    valid_files.names,
    valid_files.spelling,
)


def valid_vectors() -> list[Valid]:
    """Return all valid vectors."""
    return [one for section in SECTIONS for one in section()]
