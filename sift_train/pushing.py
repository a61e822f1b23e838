"""Pushes the delta of a training to the Hub, with the base that the model was loaded from."""

from __future__ import annotations

import tempfile
from functools import partial
from os import PathLike
from pathlib import Path

import sparsedelta
from sift_train.export import export_delta
from sift_train.ranks.shard import is_sharded
from sift_train.sift import SIFT


def push_delta(
    sift: SIFT,
    repo_id: str,
    *,
    base: str | PathLike[str] | None,
    base_id: str | None,
    private: bool | None,
    revision: str | None,
    commit_message: str | None,
    token: str | bool | None,
    dry_run: bool,
) -> sparsedelta.PushReport:
    """Upload the delta of a training; see ``SIFT.push_to_hub``."""
    sift.reshard()  # FSDP2 leaves the root's parameters whole after a forward pass
    is_divided = any(is_sharded(parameter) for parameter in sift.model.parameters())
    if not (is_divided or sift.ranks.is_first):
        raise ValueError(
            "this is not rank 0, and all ranks hold the same model; call push_to_hub on rank 0 only (if sift.ranks.is_first)"
        )
    found_id, found = loaded_from(sift)
    base_id = base_id or found_id
    base = base or found or _cached(base_id, token)
    if base is None:
        raise ValueError(
            f"it is not known from where {type(sift.model).__name__} was loaded; give base, the folder of its"
            " weights, and base_id, their repository"
        )
    with tempfile.TemporaryDirectory(prefix="sift-push-") as folder:
        delta = Path(folder) / "delta.sd"
        export_delta(sift.model, delta, sift=sift, base=base, base_id=base_id)
        push = partial(
            sparsedelta.push,
            delta,
            repo_id,
            base_id=base_id,
            base=base,
            private=private,
            revision=revision,
            commit_message=commit_message,
            token=token,
            dry_run=dry_run,
        )
        return sift.ranks.first_does(push) if is_divided else push()


def loaded_from(sift: SIFT) -> tuple[str | None, Path | None]:
    """Return the repository with its commit, or the folder, that a transformers model was loaded from."""
    config = sift.first_config
    name = getattr(config, "_name_or_path", None)
    if not name:
        return None, None
    if Path(name).is_dir():
        return None, Path(name)
    commit = getattr(config, "_commit_hash", None)
    return (f"{name}@{commit}" if commit else str(name)), None


def _cached(base_id: str | None, token: str | bool | None) -> Path | None:
    """Return the folder of a repository in the cache; it is downloaded where files are missing."""
    if base_id is None:
        return None
    from huggingface_hub import snapshot_download

    name, _, revision = base_id.partition("@")
    return Path(snapshot_download(name, revision=revision or None, token=token))
