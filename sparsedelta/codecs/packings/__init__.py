"""Value packings (FORMAT §7): streams of bytes for the codes of one chunk.

A registry. Each packing is one object with the methods of ``ValuePacking``, in its own file. The encoder
keeps the packing with the smallest stored streams. The decoder uses the one that the delta names.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from sparsedelta.codecs.packings.contract import ValuePacking
from sparsedelta.codecs.packings.planes import PLANES
from sparsedelta.codecs.packings.scaled import SCALED
from sparsedelta.codecs.packings.steps import STEPS

__all__ = ["VALUE_PACKINGS", "ValuePacking"]

# The encoder tries them in this order, and keeps the first of equally small ones.
VALUE_PACKINGS: Mapping[str, ValuePacking] = MappingProxyType(
    {"planes": PLANES, "steps": STEPS, "scaled": SCALED}
)
