"""The folders of PEFT adapters: a configuration and one safetensors file, with names of modules."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsedelta.errors import Corrupt, UnsupportedFeature
from sparsedelta.interop.files import Array, write_json, write_safetensors
from sparsedelta.interop.source import Source

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_SUFFIX = ".weight"


def kind_of(source: Source) -> str:
    """Return the ``peft_type`` of an adapter's folder; an empty text if it is none."""
    config = source.json(CONFIG)
    found = config.get("peft_type") if isinstance(config, dict) else None
    return found if isinstance(found, str) else ""


def config_of(source: Source) -> dict[str, Any]:
    """Return the configuration of an adapter whose weights are in a safetensors file.

    Raises:
        FormatError: the folder has no safetensors file, or its configuration is damaged.
    """
    if WEIGHTS not in source.names:
        raise UnsupportedFeature(
            f"'{source.path}' has no {WEIGHTS}; an adapter_model.bin can run code when it is loaded, so save the"
            " adapter again with a newer PEFT"
        )
    config = source.required_json(CONFIG)
    if not isinstance(config, dict):
        raise Corrupt(f"'{source.path / CONFIG}' is no JSON object; the adapter is damaged")
    return config


def check_unused(config: Mapping[str, Any], known: frozenset[str], source: Source) -> None:
    """Raise UnsupportedFeature if an option that is not in ``known`` is in use."""
    for key, value in config.items():
        if key not in known and value:
            raise UnsupportedFeature(
                f"'{source.path / CONFIG}' sets {key[:60]} to {json.dumps(value)[:60]}, which this release cannot merge;"
                " merge the adapter with PEFT, and make a delta of the result"
            )


def module_of(key: str, suffix: str) -> str:
    """Return the module that a key of the adapter's file belongs to.

    Raises:
        Corrupt: the key has another form.
    """
    if not (key.startswith(_PREFIX) and key.endswith(suffix)):
        raise Corrupt(
            f"the adapter holds {key!r}, expected a name that begins with {_PREFIX!r} and ends with {suffix!r}"
        )
    return key[len(_PREFIX) : -len(suffix)]


def tensor_of(module: str) -> str:
    """Return the name of a module's weight in a checkpoint."""
    return module + _SUFFIX


def module_of_tensor(name: str) -> str | None:
    """Return the module that a tensor is the weight of; None if it is no weight."""
    return name.removesuffix(_SUFFIX) if name.endswith(_SUFFIX) else None


def write_adapter(out: Path, config: Mapping[str, Any], tensors: Mapping[str, Array]) -> None:
    """Write the folder of an adapter.

    Args:
        out: the folder, which does not exist.
        config: the configuration.
        tensors: by module and suffix.
    """
    out.mkdir()
    named = {_PREFIX + key: array for key, array in tensors.items()}
    write_safetensors(out / WEIGHTS, named, {"format": "pt"})
    write_json(out / CONFIG, dict(config))
