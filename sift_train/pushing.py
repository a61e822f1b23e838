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

_SAY_NOTHING = ("README.md", ".gitattributes")  # files that do not tell one model from another


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
    loaded = getattr(sift.first_config, "_name_or_path", None)
    if loaded and Path(loaded).is_dir():
        base = base or loaded
    elif loaded and base_id is None:
        base_id = _with_commit(loaded, sift)
    base = base or _cached(base_id, token)
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


def _with_commit(name: str, sift: SIFT) -> str:
    """Return the repository that a transformers model was loaded from, with its commit if that can be found out.

    Raises:
        ValueError: the cache has several commits of the repository, whose files differ.
    """
    # Of later versions of transformers the configuration does not name it.
    commit = getattr(sift.first_config, "_commit_hash", None) or _commit_in_cache(name)
    return f"{name}@{commit}" if commit else name


def _commit_in_cache(name: str) -> str | None:
    """Return the commit of a repository whose weights are in the cache; None if there is none."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    place = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"))
    found: dict[frozenset[tuple[str, str]], str] = {}
    for snapshot in sorted(place.glob("snapshots/*"), key=lambda path: path.stat().st_mtime):
        files = {
            path.relative_to(snapshot).as_posix(): path.resolve().name
            for path in snapshot.rglob("*")
            if path.is_file() and path.name not in _SAY_NOTHING
        }
        if any(file.endswith(".safetensors") for file in files):
            found[frozenset(files.items())] = snapshot.name
    if len(found) > 1:
        raise ValueError(
            f"the cache has several commits of '{name}' ({', '.join(one[:12] for one in found.values())}), and it is not known"
            f" which one the model was loaded from; give it: base_id='{name}@<commit>'"
        )
    return next(iter(found.values()), None)


def _cached(base_id: str | None, token: str | bool | None) -> Path | None:
    """Return the folder of a repository in the cache; it is downloaded where files are missing."""
    if base_id is None:
        return None
    from huggingface_hub import snapshot_download

    name, _, revision = base_id.partition("@")
    return Path(snapshot_download(name, revision=revision or None, token=token))
