"""The contract of a form: recognise it from content, read it with its base, write it from base and target."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, TypeAlias

from sparsedelta._typing import JSON
from sparsedelta.errors import UnsupportedFeature
from sparsedelta.files.checkpoint import Checkpoint
from sparsedelta.interop.abilities import Abilities
from sparsedelta.interop.source import Source
from sparsedelta.interop.transition import Transition

Setting: TypeAlias = str | int
Settings: TypeAlias = Mapping[str, Setting | tuple[Setting, ...]]


@dataclass(frozen=True, slots=True)
class Reading:
    """A foreign delta that was opened with its base.

    Attributes:
        target: the checkpoint that it rebuilds. It uses the open files of the base.
        proof: what its digests prove about the target; see ``Abilities``.
        says: what the file says about itself, such as version numbers.
        check: compares the digests that concern several tensors; raises FormatError. The digests of single
            tensors are compared whenever a tensor is read.
    """

    target: Checkpoint
    proof: str
    says: Mapping[str, JSON] = field(default_factory=dict)
    check: Callable[[], None] = lambda: None


class Form(ABC):
    """A form of delta. A subclass that cannot be read or written says why in ``not_read`` or ``not_written``.

    Attributes:
        name: short name, for ``--from`` and ``--to``.
        title: the project and what the form is.
        source: which version of the other project's source the form was checked against.
        is_folder: whether it is written as a folder.
        abilities: what it can hold.
        settings: what can be chosen when it is written, with the default; a tuple lists the possible values,
            the first of which is the default.
        not_read, not_written: why it is not; None if it is.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    is_folder: ClassVar[bool] = False
    abilities: ClassVar[Abilities] = Abilities()
    settings: ClassVar[Settings] = {}
    not_read: ClassVar[str | None] = None
    not_written: ClassVar[str | None] = None

    @abstractmethod
    def recognise(self, source: Source) -> bool:
        """Return whether a file or folder has this form. At most one form says so."""

    def accepts(self, source: Source) -> bool:
        """Return whether a file or folder can be read as this form if the caller names the form."""
        return self.recognise(source)

    def read(self, source: Source, base: Checkpoint) -> Reading:
        """Return the delta, opened with its base.

        Raises:
            FormatError: the file is damaged, or does not fit the base.
            StructureMismatch: the base lacks a tensor that the delta changes.
        """
        raise UnsupportedFeature(f"{self.title} cannot be read: {self.not_read}")

    def write(self, change: Transition, out: Path, settings: Mapping[str, Setting]) -> None:
        """Write the form to a new file or folder.

        Args:
            change: base and target. What the form cannot hold is reported to it.
            out: the path of the output, which does not exist.
            settings: a value for each key of ``settings``.
        """
        raise UnsupportedFeature(f"{self.title} cannot be written: {self.not_written}")

    def chosen(self, given: Mapping[str, Setting | str]) -> dict[str, Setting]:
        """Return the settings to write with: the defaults, replaced by those given.

        Raises:
            ValueError: a setting is unknown, or has a value that is not possible.
        """
        unknown = given.keys() - self.settings.keys()
        if unknown:
            known = ", ".join(self.settings) or "none"
            raise ValueError(f"{self.name} has no setting {min(unknown)!r}; its settings: {known}")
        return {key: _value(key, given.get(key), known) for key, known in self.settings.items()}


def _value(key: str, given: Setting | None, known: Setting | tuple[Setting, ...]) -> Setting:
    choices = known if isinstance(known, tuple) else None
    default = choices[0] if choices else known
    if given is None:
        assert not isinstance(default, tuple)
        return default
    value: Setting = given
    if isinstance(default, int):
        if not str(given).isascii() or not str(given).isdigit():
            raise ValueError(f"setting {key} is {given!r}, expected a number")
        value = int(given)
    if choices is not None and value not in choices:
        raise ValueError(
            f"setting {key} is {value!r}, expected one of {', '.join(map(str, choices))}"
        )
    return value
