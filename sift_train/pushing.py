"""Pushes the delta of a training to the Hub, with the base that the model was loaded from."""

from __future__ import annotations

import re
import tempfile
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import sparsedelta
from sift_train.export import export_delta
from sift_train.masks import DELTA_SUFFIX
from sift_train.ranks.shard import is_sharded
from sift_train.saved import STATE_NAME
from sift_train.sift import SIFT

_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")
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
    loaded: Any = getattr(sift.first_config, "_name_or_path", None)
    if loaded and Path(loaded).is_dir():
        base = base or loaded
    elif base_id is None and loaded not in (None, "None") and _REPOSITORY.fullmatch(loaded):
        base_id = _with_commit(loaded, sift, token)
    if base is None and base_id is None:
        raise ValueError(
            f"it is not known from where {type(sift.model).__name__} was loaded; give base, the folder of its"
            " weights, and base_id, their repository"
        )
    with tempfile.TemporaryDirectory(prefix="sift-push-") as folder:
        base = base or _downloaded(str(base_id), Path(folder), token)
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


def _with_commit(name: str, sift: SIFT, token: str | bool | None) -> str:
    """Return the repository that a transformers model was loaded from, with its commit if that can be found out."""
    # Of later versions of transformers the configuration does not name it.
    commit = getattr(sift.first_config, "_commit_hash", None) or _commit_in_cache(name, token)
    return f"{name}@{commit}" if commit else name


def _commit_in_cache(name: str, token: str | bool | None) -> str | None:
    """Return the latest commit of a repository whose weights are in the cache; None if there is none.

    Raises:
        ValueError: the cache has several, whose files differ.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RevisionNotFoundError
    from huggingface_hub.file_download import repo_folder_name

    place = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"))
    snapshots = sorted(place.glob("snapshots/*"), key=lambda path: path.stat().st_mtime)
    commits = [one.name for one in snapshots if any(one.rglob("*.safetensors"))]

    def files_of(commit: str) -> frozenset[tuple[str, str | None]]:
        """Return the files of a commit; none if the repository no longer has it."""
        try:
            info = HfApi(token=token).model_info(name, revision=commit, files_metadata=True)
        except RevisionNotFoundError:
            return frozenset()
        return frozenset(
            (file.rfilename, file.blob_id)
            for file in info.siblings or ()
            if file.rfilename not in _SAY_NOTHING
        )

    contents = {commit: files_of(commit) for commit in commits} if len(commits) > 1 else {}
    commits = [commit for commit in commits if contents.get(commit, True)]
    if len({contents.get(commit) for commit in commits}) > 1:
        raise ValueError(
            f"the cache has several commits of '{name}' that differ ({', '.join(one[:12] for one in commits)}), and it is not"
            f" known which one the model was loaded from; give it: base_id='{name}@<commit>'"
        )
    return commits[-1] if commits else None


def _downloaded(base_id: str, folder: Path, token: str | bool | None) -> Path:
    """Return a folder with the checkpoint of a repository: in the cache, or in ``folder`` if it holds a delta."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    name, _, revision = base_id.partition("@")
    if name.startswith("hf://"):
        return sparsedelta.pull(base_id, folder / "base", token=token).out
    try:
        found = Path(snapshot_download(name, revision=revision or None, token=token))
    except HfHubHTTPError as error:
        raise ValueError(
            f"base '{base_id}' cannot be downloaded ({str(error).strip().splitlines()[0]}); give base, the folder of its weights,"
            " and base_id, their repository"
        ) from error
    has_weights = any(path.name != STATE_NAME for path in found.glob("*.safetensors"))
    if has_weights or not any(found.rglob(f"*{DELTA_SUFFIX}")):
        return found
    return sparsedelta.pull(base_id, folder / "base", token=token).out
