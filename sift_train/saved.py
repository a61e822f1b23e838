"""Saves and restores what a SIFT needs to resume bit for bit: indices, originals, masters, buffers.

The state is one safetensors file. It does not contain the model: the caller loads that from the
base, and ``restore`` checks its selected weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sift_train.buffers import set_buffers
from sift_train.kept import Kept

if TYPE_CHECKING:
    from sift_train.sift import SIFT

FORMAT = {"format": "sift-state", "format_version": "1"}
STATE_NAME = "sift.safetensors"  # the file of a state beside a delta or in a checkpoint
SETTINGS = "settings"
INDEX, ORIGINAL, MASTER = "index:", "original:", "master:"
BUFFER, FIRST_BUFFER = "buffer:", "first_buffer:"
KEPT = ("kept_index:", "kept_original:", "kept_value:")
COMPENSATION = "compensation:"
LR_SHARE, N_RESELECTIONS, N_ROUNDINGS = "lr_share", "n_reselections", "n_roundings"


def state_of(sift: SIFT) -> dict[str, Tensor]:
    """Return copies, on the CPU, of all tensors that ``restore`` needs.

    Parameters whose components are not chosen yet are left out.
    """
    _refuse_shards(sift)
    state: dict[str, Tensor] = {}
    for name, part in sift.sparse_mapping.items():
        if part.original is None:
            continue
        if not part.trains_all:
            state[INDEX + name] = part.flat_index
        state[ORIGINAL + name] = part.original
        state[MASTER + name] = part.saved_masters
        if part.lean is not None and part.lean.compensation is not None:
            state[COMPENSATION + name] = part.lean.compensation
        if part.kept_state is not None:
            state.update(zip((key + name for key in KEPT), part.kept_state, strict=True))
    for name, buffer in sift.model.named_buffers():
        state[BUFFER + name] = buffer
    for name, buffer in sift.first_buffers.items():
        state[FIRST_BUFFER + name] = buffer
    if sift.lr_share is not None:
        state[LR_SHARE] = torch.tensor(sift.lr_share, dtype=torch.float64)
    if sift.n_reselections:
        state[N_RESELECTIONS] = torch.tensor(sift.n_reselections)
    if sift.rounding.n_steps:
        state[N_ROUNDINGS] = torch.tensor(sift.rounding.n_steps)
    return {key: value.detach().to("cpu", copy=True) for key, value in state.items()}


def restore(sift: SIFT, state: Mapping[str, Tensor]) -> None:
    """Restore a state; the model must hold the base's weights or the trained weights.

    Raises:
        ValueError: the state is of other parameters, or the model holds other weights.
    """
    _refuse_shards(sift)
    saved = {key.removeprefix(MASTER) for key in state if key.startswith(MASTER)}
    unknown = sorted(saved - set(sift.sparse_mapping))
    if unknown:
        raise ValueError(
            f"the saved state trains {unknown[0]!r}, which is not trained here; "
            "use the sparse_module and exception it was made with"
        )
    for name, part in sift.sparse_mapping.items():
        if name in saved:
            index = state.get(INDEX + name)
            held = [state[key + name] for key in KEPT if key + name in state]
            kept = (Kept(held[0], held[1]), held[2]) if held else None
            part.restore(
                index,
                state[ORIGINAL + name],
                state[MASTER + name],
                kept,
                state.get(COMPENSATION + name),
            )
        elif part.is_selected:
            raise ValueError(
                f"the saved state lacks {name!r}, which is trained here; "
                "use the sparse_module and exception it was made with"
            )
    sift.rounding.n_steps = int(state.get(N_ROUNDINGS, 0))
    sift.n_reselections = int(state.get(N_RESELECTIONS, 0))
    sift.lr_share = float(state[LR_SHARE]) if LR_SHARE in state else None
    for name in sift.first_buffers:
        if FIRST_BUFFER + name in state:
            sift.first_buffers[name] = state[FIRST_BUFFER + name].clone()
    buffers = [key for key in state if key.startswith(BUFFER)]
    set_buffers(sift.model, {key.removeprefix(BUFFER): state[key] for key in buffers})


def _refuse_shards(sift: SIFT) -> None:
    if any(part.shard is not None for part in sift.sparse_mapping.values()):
        raise ValueError(
            "the model is sharded, and each rank holds a part of the state; use"
            " sift_train.save_sharded and sift_train.load_sharded"
        )


def write_state(
    state: Mapping[str, Tensor],
    path: str | PathLike[str],
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write a state as a safetensors file, with the settings of its training as plain JSON."""
    contiguous = {key: value.contiguous() for key, value in state.items()}
    more = {} if settings is None else {SETTINGS: json.dumps(settings)}
    save_file(contiguous, path, metadata={**FORMAT, **more})


def check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Check that the training whose state was written to a file has these settings, if the file records them.

    A file that is missing or damaged is left to ``read_state``.

    Raises:
        ValueError: a setting differs.
    """
    try:
        with safe_open(path, framework="pt") as file:
            recorded = (file.metadata() or {}).get(SETTINGS)
    except (FileNotFoundError, SafetensorError):
        return
    if recorded is not None:
        refuse_other_settings(json.loads(recorded), settings, path.parent)


def refuse_other_settings(
    saved: Mapping[str, Any], settings: Mapping[str, Any], checkpoint: Path
) -> None:
    """Refuse to resume a run from a checkpoint of a run with other settings.

    Raises:
        ValueError: a setting differs.
    """
    for key in sorted({*saved, *settings}):
        if saved.get(key) != settings.get(key):
            if key == "data.fingerprint":
                raise ValueError(
                    f"the run saved in '{checkpoint}' was trained on other data, or on these in other micro-batches or cut at"
                    " another length; resume with the same, or start a new run"
                )
            raise ValueError(
                f"the run saved in '{checkpoint}' has {key} {saved.get(key)!r}, "
                f"this one {settings.get(key)!r}; resume with the same settings, or start a new run"
            )


def read_state(path: str | PathLike[str]) -> dict[str, Tensor]:
    """Return the state in a file that ``write_state`` wrote.

    Raises:
        ValueError: the file is not a training state of version 1.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            if {key: found.get(key) for key in FORMAT} != FORMAT:
                raise ValueError(
                    f"'{path}' is not a training state of version 1; give a file that "
                    "SIFT.save wrote"
                )
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise ValueError(
            f"'{path}' is not a safetensors file, so it is not a training state: {error}; "
            "give a file that SIFT.save wrote"
        ) from error
