"""A model in memory as a checkpoint for ``diff``: as one file, or with the files of an existing folder."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from sparsedelta._typing import AnyPath, Model
from sparsedelta.errors import StructureMismatch
from sparsedelta.files.checkpoint import Checkpoint, Tensor, WeightFile
from sparsedelta.files.shards import roles
from sparsedelta.format.records import TensorSpec
from sparsedelta.format.safetensors_header import Header, HeaderEntry, render_header
from sparsedelta.live.bits import SAVED_DTYPES, TensorBytes, check_installed
from sparsedelta.live.folder_state import FolderState
from sparsedelta.live.loading import is_transformers
from sparsedelta.live.parts import components_of, folder_of
from sparsedelta.live.saved import SavedState, unwrapped

if TYPE_CHECKING:
    import torch

FILE_NAME = "model.safetensors"


@dataclass(frozen=True, slots=True)
class HeldTensor(Tensor):
    """A tensor of a checkpoint whose data is in a model.

    Attributes:
        saved: the model.
        own: the tensor's name in ``saved``.
    """

    saved: SavedState | FolderState
    own: str

    def held(self) -> torch.Tensor:
        """Return the tensor, contiguous, on the model's device."""
        return self.saved.read(self.own)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with the tensor's bytes from ``offset``; both must be multiples of the element size."""
        TensorBytes(self.held()).read_into(buffer, offset)


class HeldFile(Checkpoint):
    """A model as the ``model.safetensors`` file that it would be saved to."""

    def __init__(self, model: Model) -> None:
        """Build the file's header. Raises the errors of ``SavedState``."""
        saved = self._saved = SavedState(model)
        self.path = Path(f"{saved.kind} in memory")
        self.is_folder = False
        self._fds = []
        file = weight_file(FILE_NAME, saved.metadata, laid_out(saved.specs))
        tensors = tuple(_held(tensor, saved, tensor.name) for tensor in file.tensors)
        self.weight_files = (replace(file, tensors=tensors),)
        self.tensors = {tensor.key: tensor for tensor in tensors}
        self.roles = roles([FILE_NAME], {})
        self.side_files = {}
        self.empty_folders = self.left_out = ()

    def close(self) -> None:
        """Release the model's tensors."""
        super().close()
        self._saved.close()


class HeldFolder(Checkpoint):
    """A checkpoint folder whose tensors are replaced by those of a model."""

    def __init__(
        self,
        model: Model,
        folder: AnyPath,
        *,
        exclude: Sequence[str] = (),
        include: Sequence[str] | None = None,
        strict: bool = True,
    ) -> None:
        """Open the folder and find its tensors in the model.

        Args:
            model: a module, a state dict or a pipeline of diffusers.
            folder: a checkpoint of that model.
            exclude: globs of files to leave out; see ``Checkpoint``.
            include: globs of files to keep that are left out by default; see ``Checkpoint``.
            strict: the model must have all tensors of the folder. If false, a tensor that the model lacks is
                read from the folder, and so are all tensors of a part that a pipeline lacks.

        Raises:
            StructureMismatch: the model has other tensors than the folder, or the folder has a name twice.
            CheckpointError: the folder is not a checkpoint.
        """
        self._parts: list[SavedState | FolderState] = []
        super().__init__(folder, exclude=exclude, include=include)
        try:
            for part, tensors in self._divided(model, strict=strict):
                saved = _state_of(part, tensors)
                self._parts.append(saved)
                self._replace_tensors(saved, tensors, strict=strict)
        except BaseException:
            self.close()
            raise
        self.weight_files = tuple(
            replace(file, tensors=tuple(self.tensors[t.key] for t in file.tensors))
            for file in self.weight_files
        )

    def close(self) -> None:
        """Close all files and release the model's tensors."""
        super().close()
        for saved in self._parts:
            saved.close()

    def _divided(self, model: Model, *, strict: bool) -> list[tuple[Model, list[Tensor]]]:
        """Return the models that the folder holds, each with its tensors: several if it is a pipeline's."""
        components = components_of(model)
        if components is None:
            return [(model, [*self.tensors.values()])]
        by_folder: dict[str, list[Tensor]] = defaultdict(list)
        for tensor in self.tensors.values():
            by_folder[folder_of(tensor.file)].append(tensor)
        absent = by_folder.keys() - components.keys()
        if absent and (strict or absent == by_folder.keys()):
            raise StructureMismatch(
                f"'{self.path}' has weights in the folder '{min(absent)}', and the {type(model).__name__} has no"
                " such part; load the pipeline with it, or let diff take its tensors from the folder"
                " (strict=False)"
            )
        return [(part, by_folder[name]) for name, part in components.items()]

    def _replace_tensors(
        self, saved: SavedState | FolderState, tensors: Sequence[Tensor], *, strict: bool
    ) -> None:
        by_name: dict[str, list[Tensor]] = defaultdict(list)
        for tensor in tensors:
            by_name[tensor.name].append(tensor)
        tied = saved.tied if isinstance(saved, SavedState) else {}
        own = {name: tied.get(name, name) for name in by_name}
        own = {name: held for name, held in own.items() if held in saved.specs}
        missing = by_name.keys() - own.keys()
        if missing and (strict or not own):
            other_way = (
                ", or let diff take its tensors from the folder (strict=False)" if own else ""
            )
            raise self._error(missing, f"'{self.path}' has", f"the {saved.kind} lacks", other_way)
        extra = saved.specs.keys() - own.values()
        if isinstance(saved, SavedState):
            extra -= saved.shared(own.values())
        if extra:
            raise self._error(extra, f"the {saved.kind} has", f"'{self.path}' lacks")
        for name, held in own.items():
            first, *others = by_name[name]
            if others:
                raise StructureMismatch(
                    f"tensor {name!r} is in '{first.file}' and in '{others[0].file}', and the"
                    f" {saved.kind} has it once; leave out one of the files (exclude)",
                    tensor=name,
                )
            self._check_layout(first, saved.specs[held])
            self.tensors[first.key] = _held(first, saved, held)

    def _error(
        self, names: Collection[str], has: str, lacks: str, other_way: str = ""
    ) -> StructureMismatch:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return StructureMismatch(
            f"{has} tensor {min(names)!r}{more}, which {lacks}; save the model and give the path of the saved"
            f" checkpoint{other_way}",
            tensor=min(names),
        )

    def _check_layout(self, tensor: Tensor, held: TensorSpec) -> None:
        spec = tensor.spec
        if not spec.same_layout(held):
            raise StructureMismatch(
                f"tensor {tensor.name!r} is {held.dtype.name} {list(held.shape)} in memory and"
                f" {spec.dtype.name} {list(spec.shape)} in '{self.path}'; save the model and give the path"
                " of the saved checkpoint",
                tensor=tensor.name,
                expected=f"{spec.dtype.name} {list(spec.shape)}",
                found=f"{held.dtype.name} {list(held.shape)}",
            )


def held_checkpoint(
    model: Model,
    folder: AnyPath | None = None,
    *,
    exclude: Sequence[str] = (),
    include: Sequence[str] | None = None,
    strict: bool = True,
) -> Checkpoint:
    """Return a model in memory as a checkpoint: one file, or with ``folder`` the files of that folder.

    Raises:
        StructureMismatch: no folder is given for a pipeline; or see ``HeldFolder``.
    """
    check_installed("torch")
    if folder is not None:
        return HeldFolder(model, folder, exclude=exclude, include=include, strict=strict)
    if components_of(model) is not None:
        raise StructureMismatch(
            f"the {type(model).__name__} consists of several models, which are not saved in one file; give a"
            " folder of this pipeline, as the base of diff or as the folder of Snapshot, or save the pipeline"
            " and give its path"
        )
    return HeldFile(model)


def _state_of(model: Model, tensors: Sequence[Tensor]) -> SavedState | FolderState:
    """Return a model as it is saved; one of transformers under the names of these tensors."""
    inner = unwrapped(model)
    if not is_transformers(inner):
        return SavedState(model)
    return FolderState(inner, {tensor.name: tensor.spec.shape for tensor in tensors})


def _held(tensor: Tensor, saved: SavedState | FolderState, own: str) -> HeldTensor:
    return HeldTensor(tensor.file, tensor.name, tensor.spec, -1, 0, saved, own)


def laid_out(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Return tensors in the order in which safetensors writes them to a file."""
    order = {name: -number for number, name in enumerate(SAVED_DTYPES)}
    return dict(sorted(specs.items(), key=lambda item: (order[item[1].dtype.name], item[0])))


def weight_file(
    path: str, metadata: Mapping[str, str] | None, specs: Mapping[str, TensorSpec]
) -> WeightFile:
    """Return the description of a weight file with these tensors, in order; none of them can be read."""
    edges = pairwise(accumulate((spec.n_bytes for spec in specs.values()), initial=0))
    entries = tuple(
        HeaderEntry(name, spec.dtype.name, spec.shape, begin, end)
        for (name, spec), (begin, end) in zip(specs.items(), edges, strict=True)
    )
    raw = render_header(metadata, entries)
    header = Header(dict(metadata) if metadata else None, entries, True)
    tensors = tuple(Tensor(path, name, spec, -1, 0) for name, spec in specs.items())
    return WeightFile(path, raw, header, tensors)
