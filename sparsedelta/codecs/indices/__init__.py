"""Index encodings (FORMAT §6): streams of bytes for strictly increasing positions within one chunk.

A registry: an encoding is one object with the methods of ``IndexEncoding``, in a file of its own. The
encoder keeps the one whose compressed stream is smallest; the decoder obeys the name in the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from sparsedelta.codecs.context import Positions
from sparsedelta.codecs.indices.bitmap import BITMAP
from sparsedelta.codecs.indices.contract import IndexEncoding
from sparsedelta.codecs.indices.everything import EVERYTHING
from sparsedelta.codecs.indices.exponent import EXPONENT
from sparsedelta.codecs.indices.gaps import GAP8, GAP16
from sparsedelta.codecs.indices.rice import RICE
from sparsedelta.codecs.indices.tiles import TILES

__all__ = ["INDEX_ENCODINGS", "IndexEncoding", "Positions"]

# In order of trial: of equally small candidates the first is kept.
INDEX_ENCODINGS: Mapping[str, IndexEncoding] = MappingProxyType(
    {
        "all": EVERYTHING,
        "gap8": GAP8,
        "gap16": GAP16,
        "bitmap": BITMAP,
        "rice": RICE,
        "tiles": TILES,
        "exponent": EXPONENT,
    }
)
