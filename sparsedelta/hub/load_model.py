"""``load_model``: load the target of a delta as a transformers model or a pipeline, from disk or from the Hub."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sparsedelta._typing import AnyPath, TorchDType
from sparsedelta.errors import MismatchError
from sparsedelta.format.delta import AnyDelta, Delta, opened
from sparsedelta.format.paths import DELTA_SUFFIX
from sparsedelta.hub.references import Reference, parse_reference
from sparsedelta.live.load_model import load_target, set_origin
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
    """Return the transformers model or the pipeline that ``from_pretrained`` would load from the target.

    The target is not written to disk. Each tensor is rebuilt from the base when transformers reads it, so
    the memory needed is that of the model and a few tensors. The target may have another structure and
    configuration than the base. Only a pipeline of diffusers is written, to a temporary folder.

    Args:
        delta: an ``.sd`` file, a folder that holds one, a loaded delta, or a repository on the Hub
            such as ``org/name@revision``. An existing path is preferred to a repository.
        base: the folder of its base; for a repository, of any checkpoint further down its chain. None: ``delta`` is a
            repository, and the base that it names is downloaded.
        model_class: a transformers class, such as ``AutoModelForCausalLM``; None: the class that the
            target's configuration names. For a pipeline, a class of diffusers.
        dtype: as for ``from_pretrained``. The bits are exact if it is the dtype of the checkpoint.
        device_map: as for ``from_pretrained``.
        verify: what to check of each tensor; see ``sparsedelta.apply``.
        options: further arguments of ``from_pretrained``. A pipeline whose files are all of one variant is
            loaded with it; if there are several, give ``{"variant": "fp16"}``.

    Raises:
        FormatError: the delta cannot be read, or is inconsistent.
        MismatchError: ``base`` is not the base of the delta.
        RemoteError: the repository or its base is not available.
        BaseNeeded: ``base`` is missing, and the delta of the repository names none.
        ValueError: ``base`` is missing, or the target has neither a ``config.json`` nor a ``model_index.json``.
    """
    load = functools.partial(
        load_target,
        model_class=model_class,
        dtype=dtype,
        device_map=device_map,
        verify=verify,
        options=options,
    )
    reference = None
    if isinstance(delta, str) and not os.path.lexists(delta) and not delta.endswith(DELTA_SUFFIX):
        reference = parse_reference(delta)
    if reference is not None:
        from sparsedelta.hub.client import Hub

        pinned = Hub(None).pin(reference)
        model = _of_repository(pinned, base, load)
        if pinned.path is None:  # a delta in a folder of a repository has no such name
            set_origin(model, pinned.repo_id, pinned.revision)
        return model
    if base is None:
        raise ValueError("base is missing; give the folder of the delta's base")
    with opened(_file(delta)) as opened_delta:
        return load(opened_delta, base)


def _of_repository(reference: Reference, base: AnyPath | None, load: Callable[..., Any]) -> Any:
    from sparsedelta.hub.sources import fetch_delta, fetched, fetched_above

    if base is None:
        with fetched(reference) as (delta, folder):
            return load(delta, folder)
    try:
        with opened(fetch_delta(reference)) as delta:
            return load(delta, base)
    except MismatchError as error:
        with fetched_above(reference, Path(base), error) as delta:
            return load(delta, base)


def _file(delta: AnyDelta) -> AnyDelta:
    """Return the only ``.sd`` file of a folder; any other argument unchanged."""
    if isinstance(delta, Delta) or not Path(delta).is_dir():
        return delta
    found = sorted(Path(delta).glob("*.sd"))
    if not found:
        return delta  # what is there instead, the error of ``opened`` says
    if len(found) > 1:
        raise ValueError(
            f"folder '{delta}' holds {len(found)} .sd files, expected one; name the file"
        )
    return found[0]
