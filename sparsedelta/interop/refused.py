"""Forms that are recognised and refused, with the reason and another way."""

from __future__ import annotations

from typing import ClassVar

from sparsedelta.interop.form import Form
from sparsedelta.interop.source import Source

_OTHER_WAY = "write the target as a checkpoint with that project, and make a delta of it (`sparsedelta diff`)"


class ComposableSft(Form):
    """A pickle, which can run code."""

    name = "composable-sft"
    title = "composable-sft, pytorch_diff.bin"
    source = "not checked; recognised by the name of its file"
    is_folder = True
    not_read: ClassVar[str | None] = (
        f"its file is a pickle that torch's safe loading refuses, so reading it could run code; {_OTHER_WAY}"
    )
    not_written: ClassVar[str | None] = not_read

    def recognise(self, source: Source) -> bool:
        """Return whether the folder holds a file of the name that composable-sft writes."""
        return "pytorch_diff.bin" in source.names


class Z4Model(Form):
    """Frames of z4ai's own entropy coders, which have no specification."""

    name = "z4ai"
    title = "z4ai, model_delta"
    source = "z4ai 0.2.0, z4ai/model_delta.py"
    not_read: ClassVar[str | None] = (
        "its frames can be decoded only by z4ai, whose entropy coders have no specification; rebuild the target with"
        " `z4ai`, and make a delta of it (`sparsedelta diff`)"
    )
    not_written: ClassVar[str | None] = "only z4ai can write its frames"

    def recognise(self, source: Source) -> bool:
        """Return whether the file begins with the magic of z4ai's deltas of models."""
        return source.start.startswith(b"Z4DM")
