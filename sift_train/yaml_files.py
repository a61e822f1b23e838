"""Reads settings from YAML files and writes them; nothing in a file is executed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import yaml  # type: ignore[import-untyped]

from sift_train.known import check_integer, proposal
from sift_train.text_files import read_text

T = TypeVar("T")


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Reads ``2e-4`` as a number, which YAML 1.1 reads as text; refuses a name that is given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        for at, (key, _) in enumerate(node.value):
            if any(key.value == before.value for before, _ in node.value[:at]):
                problem = f"{key.value!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


_Loader.yaml_implicit_resolvers = {
    key: list(resolvers) for key, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_yaml(path: str | PathLike[str]) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not YAML, or holds something else than a mapping of names.
    """
    try:
        found = yaml.load(read_text(Path(path), "settings"), Loader=_Loader)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"'{path}' is not YAML: {line}{problem or error}") from error
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise ValueError(
            f"'{path}' holds no mapping of names to values; write lines of 'name: value'"
        )
    return dict(found)


def read_settings(kind: type[T], path: str | PathLike[str]) -> T:
    """Return a dataclass of settings from a YAML file.

    Raises:
        ValueError: the file is not YAML, or as ``settings_of``.
    """
    given = read_yaml(path)
    if "train" in given:
        raise ValueError(
            f"'{path}' is a file for python -m sift_train; {kind.__name__} is read from a file of settings alone, those below"
            " 'train:'"
        )
    return settings_of(kind, given, f"'{path}'")


def names_of(kind: type[Any]) -> list[str]:
    """Return the names of the settings of a dataclass."""
    return [field.name for field in dataclasses.fields(kind)]


def settings_of(
    kind: type[T],
    given: Mapping[str, Any],
    where: str,
    *,
    elsewhere: Collection[str] = (),
    other: str = "",
) -> T:
    """Return a dataclass of settings from a mapping.

    Args:
        kind: the dataclass.
        given: the settings.
        where: what the mapping is, for messages.
        elsewhere: settings that belong to another place.
        other: what those are.

    Raises:
        ValueError: a name is unknown, a required one is missing, or a value is out of range.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in given:
        if name not in fields:
            clause = proposal(name, fields, elsewhere=elsewhere, where=other)
            raise ValueError(f"{where} has the setting {name!r}, which is not known; {clause}")
    for name, field in fields.items():
        if name not in given and field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where} lacks the setting {name!r}")
    try:
        return kind(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def check_types(settings: Any) -> None:
    """Check that the settings of a new dataclass that are true or false by default are that, and that the seed is an integer.

    Raises:
        ValueError: one is something else, such as the text "no".
    """
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if isinstance(field.default, bool) and not isinstance(value, bool):
            raise ValueError(f"{field.name} is {value!r}; it must be true or false, without quotes")
        if field.name == "seed":
            check_integer("seed", value)


def lists_to_tuples(settings: Any) -> None:
    """Turn the lists in a new frozen dataclass into tuples, so that one from a file, which has lists, is equal."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, list):
            object.__setattr__(settings, field.name, tuple(value))


def write_yaml(settings: Any, path: str | PathLike[str]) -> None:
    """Write a dataclass of settings; ``settings_of`` reads an equal one.

    Raises:
        ValueError: a setting is a function, a ``Rule``, a mask or a delta, which a file cannot hold.
    """
    fields = dataclasses.fields(settings)
    values = {field.name: _plain(field.name, getattr(settings, field.name)) for field in fields}
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    Path(path).write_text(text, "utf-8")


def _plain(name: str, value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if dataclasses.is_dataclass(value) and name == "reselection":
        return {each: _plain(each, held) for each, held in vars(value).items()}
    if isinstance(value, re.Pattern):
        return f"re:{value.pattern}"
    if isinstance(value, PathLike):
        return str(Path(value))
    if isinstance(value, list | tuple):
        return [_plain(name, each) for each in value]
    raise ValueError(
        f"{name} is of type {type(value).__name__}, which YAML cannot hold; give a name, or the path of a mask"
    )
