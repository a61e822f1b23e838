"""Index encodings (FORMAT §6): streams of bytes for strictly increasing positions within one chunk.

A registry. Each encoding is one object with the methods of ``IndexEncoding``, in its own file. The encoder
keeps the encoding with the smallest stored stream. The decoder uses the one that the delta names.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from sparsedelta.codecs.context import Positions
from sparsedelta.codecs.indices.bitmap import BITMAP
from sparsedelta.codecs.indices.contract import IndexEncoding
from sparsedelta.codecs.indices.gaps import GAPS
from sparsedelta.codecs.indices.rice import RICE
from sparsedelta.codecs.indices.tiles import TILES

__all__ = ["INDEX_ENCODINGS", "IndexEncoding", "Positions"]

# The encoder tries them in this order, and keeps the first of equally small ones.
INDEX_ENCODINGS: Mapping[str, IndexEncoding] = MappingProxyType(
    {"gaps": GAPS, "bitmap": BITMAP, "rice": RICE, "tiles": TILES}
)
