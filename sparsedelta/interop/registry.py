"""All forms, and which one a file has. A form is found by content; a file that fits two forms is refused."""

from __future__ import annotations

from sparsedelta.errors import BadMagic
from sparsedelta.format.container import begins_as_delta
from sparsedelta.interop.arc2 import Arc2
from sparsedelta.interop.form import Form
from sparsedelta.interop.grail import Grail
from sparsedelta.interop.lora import Lora
from sparsedelta.interop.mask import Mask
from sparsedelta.interop.pulse import PulsePatch
from sparsedelta.interop.refused import ComposableSft, Z4Model
from sparsedelta.interop.shira import Shira
from sparsedelta.interop.skyrl import SkyRL
from sparsedelta.interop.slime import Slime
from sparsedelta.interop.source import Source
from sparsedelta.interop.task_vector import TaskVector
from sparsedelta.interop.trl import TrlV1, TrlV2

DELTA = "sd"  # the name of this project's own form
CHECKPOINT = "checkpoint"  # the name of a whole checkpoint
ORIGINAL = "original"  # the name of a whole checkpoint in files of GGUF, ONNX or torch.save

_ALL: tuple[Form, ...] = (
    TrlV1(), TrlV2(), Slime(), SkyRL(), Grail(), PulsePatch(), Arc2(), Shira(), Lora(), TaskVector(), Mask(),
    ComposableSft(), Z4Model(),
)  # fmt: skip
FORMS = {form.name: form for form in _ALL}
NAMES = (DELTA, CHECKPOINT, ORIGINAL, *FORMS)
WRITTEN = tuple(name for name in NAMES if name not in FORMS or not FORMS[name].not_written)


def form_named(name: str) -> Form:
    """Return the form of this name. Raises ValueError if there is none."""
    if name not in FORMS:
        raise ValueError(f"there is no form {name[:40]!r}; the forms are {', '.join(NAMES)}")
    return FORMS[name]


def recognised(source: Source) -> Form | None:
    """Return the form of a file or folder; None if it is of none.

    Raises:
        BadMagic: it fits several forms.
    """
    found = [form for form in FORMS.values() if form.recognise(source)]
    if len(found) > 1:
        names = " and ".join(form.name for form in found)
        raise BadMagic(f"'{source.path}' can be read as {names}; say which (--from, read_as)")
    return found[0] if found else None


def is_delta(source: Source) -> bool:
    """Return whether a file looks like a delta of this project."""
    return begins_as_delta(source.start)
