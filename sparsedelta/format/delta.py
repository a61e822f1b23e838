"""A delta in memory: what its manifest says, and where its coded bytes are."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsedelta._typing import JSON, AnyPath, Model, ModelCheck, Names
from sparsedelta.format.container import FilePayload, payload_digest, write_container
from sparsedelta.format.manifest import Manifest
from sparsedelta.format.records import Base, Payload, Target, TensorDelta, entry_keys
from sparsedelta.fs import check_no_folder
from sparsedelta.progress import Progress
from sparsedelta.stores.base import ByteSource
from sparsedelta.stores.local import OpenFile


@dataclass(frozen=True, slots=True, repr=False)
class Delta:
    """The transition from a base to a target.

    Attributes:
        base: identity of the base.
        target: the target's files.
        tensors: rows, in the target's order, removed ones last.
        info: how the target was made; free JSON.
        payload: the coded bytes.
    """

    base: Base
    target: Target
    tensors: tuple[TensorDelta, ...]
    info: Mapping[str, JSON]
    payload: Payload

    def __repr__(self) -> str:
        base = self.base.id or self.base.fingerprint.hex()[:12]
        return f"<Delta of {base}: {self.nnz:,} of {self.numel:,} elements changed>"

    @property
    def nnz(self) -> int:
        """Changed elements over all tensors."""
        return sum(row.change.nnz for row in self.tensors if row.change)

    @property
    def numel(self) -> int:
        """Elements of the target over all tensors."""
        return sum(row.target.n_elements for row in self.tensors if row.target)

    def save(self, path: AnyPath, *, overwrite: bool = False) -> None:
        """Write the delta as one ``.sd`` file, whole or not at all.

        Raises:
            FileExistsError: ``path`` exists and ``overwrite`` is false.
            IsADirectoryError: it is a folder.
            LimitExceeded: the delta is beyond what the format can hold (FORMAT §11).
        """
        check_no_folder(Path(path))
        self.payload.check()
        digest = payload_digest(entry_keys(self.target, self.tensors), self.payload)
        manifest = Manifest(self.base, self.target, self.tensors, self.info, digest)
        write_container(manifest, self.payload, path, overwrite=overwrite)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        base_id: str | None = None,
        base: AnyPath | None = None,
        subfolder: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        commit_description: str | None = None,
        tag: str | None = None,
        token: str | bool | None = None,
        dry_run: bool = False,
        progress: Progress | None = None,
    ) -> Any:
        """Put the delta into a repository on the Hub; return the ``PushReport`` of ``sparsedelta.push``.

        Raises:
            MismatchError: the base is not the delta's.
            RemoteError: the Hub refuses, or cannot be reached.
            ValueError: an argument is wrong.
        """
        from sparsedelta.hub.push import push

        return push(
            self,
            repo_id,
            base_id=base_id,
            base=base,
            subfolder=subfolder,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            commit_description=commit_description,
            tag=tag,
            token=token,
            dry_run=dry_run,
            progress=progress,
        )

    def apply_(self, model: Model, *, verify: ModelCheck = "touched", names: Names = None) -> None:
        """Make the target of the base that a model in memory holds: in place, bit for bit.

        All tensors are checked before the first is written; on any error the model is as it was.

        Args:
            model: a ``torch.nn.Module`` or a state dict, on any device; its tensors are changed.
            verify: ``"touched"`` checks the touched values, ``"full"`` every byte of the tensors
                that the model has of the delta's base, ``"none"`` nothing but dtypes and shapes.
            names: from the name of a tensor in the delta to that in the model, None as a value: leave
                this tensor out. What torch.compile, FSDP, DDP and PEFT put into names, and one
                prefix common to all, are found without it.

        Raises:
            BaseMismatch: a tensor is neither the base's nor the target's.
            AlreadyApplied: the model already is the target.
            PartlyApplied: some tensors are the base's, others the target's.
            StructureMismatch: a changed tensor is missing or has another dtype or shape, or the
                delta adds, removes or reshapes tensors.
            FormatError: the delta is damaged or is inconsistent.
            ValueError: the delta lacks what ``verify`` asks for.
        """
        from sparsedelta.live.inplace import apply_

        apply_(self, model, verify=verify, names=names)

    def revert_(self, model: Model, *, verify: ModelCheck = "touched", names: Names = None) -> None:
        """Make the base of the target that a model in memory holds; see ``apply_``.

        Raises:
            ConflictError: the delta holds new values, not differences.
            MismatchError: as for ``apply_``; ``AlreadyApplied``: the model already is the base.
        """
        from sparsedelta.live.inplace import revert_

        revert_(self, model, verify=verify, names=names)

    def applied(
        self, model: Model, *, verify: ModelCheck = "touched", names: Names = None
    ) -> AbstractContextManager[None]:
        """Return a context in which the model is the target; see ``apply_``.

        At its end the touched elements get the bits back that they had, whatever they are then.
        """
        from sparsedelta.live.inplace import applied

        return applied(self, model, verify=verify, names=names)

    def close(self) -> None:
        """Close the file or spool behind the payload; the delta can no longer be applied."""
        self.payload.close()

    def __enter__(self) -> Delta:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def load(path: AnyPath) -> Delta:
    """Return the delta in a ``.sd`` file: header and manifest read and checked, the payload on demand.

    The file stays open until ``Delta.close``; the payload is compared with its digest before it is
    first used.

    Raises:
        FormatError: the file is not a delta this version can read.
        OSError: it cannot be opened.
    """
    return read_delta(OpenFile(path))


def read_delta(source: ByteSource) -> Delta:
    """Return the delta whose file has these bytes; see ``load``. The source is closed with it."""
    payload = FilePayload(source)
    try:
        manifest = payload.open()
        payload.check_against(manifest)
    except BaseException:
        payload.close()
        raise
    return Delta(manifest.base, manifest.target, manifest.tensors, manifest.info, payload)
