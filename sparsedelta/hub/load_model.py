"""``load_model``: a transformers model with a delta applied, from disk or from the Hub."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sparsedelta._typing import AnyPath, TorchDType
from sparsedelta.format.delta import AnyDelta, Delta, opened
from sparsedelta.hub.references import parse_reference
from sparsedelta.live.load_model import load_target
from sparsedelta.tensors.rebuild import Check


def load_model(
    delta: AnyDelta,
    *,
    base: AnyPath | None = None,
    model_class: Any = None,
    dtype: TorchDType = "auto",
    device_map: Any = None,
    verify: Check = "full",
    options: Mapping[str, Any] | None = None,
) -> Any:
    """Return the transformers model that ``from_pretrained`` would load from the target.

    The target is not written: its tensors are made of the base's as the model takes them up, so that
    memory holds one model and a tensor or two. The target may differ in structure and configuration.

    Args:
        delta: an ``.sd`` file, a folder that holds one, a loaded delta, or a repository on the Hub
            such as ``org/name@revision``; a path that exists wins.
        base: the folder of its base; for a repository the base that it names is fetched.
        model_class: a transformers class, such as ``AutoModelForCausalLM``; None: the one that the
            target's configuration names.
        dtype: as for ``from_pretrained``; bits are kept where it is that of the checkpoint.
        device_map: as for ``from_pretrained``.
        verify: what to check of each tensor; see ``sparsedelta.apply``.
        options: more arguments of ``from_pretrained``.

    Raises:
        FormatError: the delta cannot be read, or is inconsistent.
        MismatchError: ``base`` is not its base.
        RemoteError: the repository or its base is not available.
        ValueError: ``base`` is missing or superfluous, or the target has no configuration of a transformers model.
    """
    with ExitStack() as context:
        given, place = _given(delta, base, context)
        return load_target(
            given,
            place,
            model_class=model_class,
            dtype=dtype,
            device_map=device_map,
            verify=verify,
            options=options,
        )


def _given(delta: AnyDelta, base: AnyPath | None, context: ExitStack) -> tuple[Delta, AnyPath]:
    """Return the delta and where its base is, fetched or as given."""
    reference = None
    if isinstance(delta, str) and not os.path.lexists(delta) and not delta.endswith(".sd"):
        reference = parse_reference(delta)
    if reference is not None:
        from sparsedelta.hub.sources import fetched

        if base is not None:
            raise ValueError(f"'{delta}' is a repository, which names its base; leave base out")
        return context.enter_context(fetched(reference))
    if base is None:
        raise ValueError("the delta's base is not given; give its folder as base")
    return context.enter_context(opened(_file(delta))), base


def _file(delta: AnyDelta) -> AnyDelta:
    """Return the only delta in a folder; anything else as it is."""
    if isinstance(delta, Delta) or not Path(delta).is_dir():
        return delta
    found = sorted(Path(delta).glob("*.sd"))
    if len(found) != 1:
        raise ValueError(
            f"folder '{delta}' holds {len(found)} .sd files, expected one; name the file"
        )
    return found[0]
