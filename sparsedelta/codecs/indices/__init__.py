"""Index encodings (FORMAT §6): streams of bytes for strictly increasing positions within one chunk.

A registry: an encoding is one object with the methods of ``IndexEncoding``, in a file of its own. The
encoder keeps the one whose stored stream is smallest; the decoder obeys the name in the file.
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

# In order of trial: of equally small candidates the first is kept.
INDEX_ENCODINGS: Mapping[str, IndexEncoding] = MappingProxyType(
    {"gaps": GAPS, "bitmap": BITMAP, "rice": RICE, "tiles": TILES}
)
