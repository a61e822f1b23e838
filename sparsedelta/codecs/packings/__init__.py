"""Value packings (FORMAT §7): streams of bytes for the codes of one chunk.

A registry: a packing is one object with the methods of ``ValuePacking``, in a file of its own. The
encoder keeps the one whose stored streams are smallest; the decoder obeys the name in the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from sparsedelta.codecs.packings.contract import ValuePacking
from sparsedelta.codecs.packings.planes import PLANES
from sparsedelta.codecs.packings.scaled import SCALED
from sparsedelta.codecs.packings.steps import STEPS

__all__ = ["VALUE_PACKINGS", "ValuePacking"]

# In order of trial: of equally small candidates the first is kept.
VALUE_PACKINGS: Mapping[str, ValuePacking] = MappingProxyType(
    {"planes": PLANES, "steps": STEPS, "scaled": SCALED}
)
