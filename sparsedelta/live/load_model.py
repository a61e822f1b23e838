"""``load_model``: load the target of a delta as a transformers model, tensor by tensor.

Only small configuration files are written to disk, and no tensor is in memory twice.
"""

from __future__ import annotations

import threading
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any

from sparsedelta._typing import AnyPath, TorchDType
from sparsedelta.errors import SparseDeltaError, StructureMismatch
from sparsedelta.files.checkpoint import Checkpoint, read_index
from sparsedelta.files.shards import INDEX_SUFFIX, SHARD, roles
from sparsedelta.files.side_files import write_side_file
from sparsedelta.format.delta import Delta
from sparsedelta.format.paths import WEIGHT_SUFFIX
from sparsedelta.format.records import Row, SideFile, TensorKey
from sparsedelta.fs import temporary_folder
from sparsedelta.live.bits import check_installed, shape_in_torch, torch_dtype
from sparsedelta.live.load_pipeline import load_pipeline
from sparsedelta.live.parts import is_of_pipeline
from sparsedelta.live.slots import find_slots
from sparsedelta.ops.base_check import explained, find_base, open_base
from sparsedelta.progress import Silent
from sparsedelta.tensors.parallel import Pace
from sparsedelta.tensors.rebuild import Check, rebuild

if TYPE_CHECKING:
    import torch

_CONFIG = "config.json"
_GENERATION = "generation_config.json"
_MAX_LISTED = 3  # tensors named in a warning
# Names of weight files without suffix, in order of preference.
_ROLES = ("model", "pytorch_model", "diffusion_pytorch_model")


def load_target(
    delta: Delta,
    base: AnyPath,
    *,
    model_class: Any,
    dtype: TorchDType,
    device_map: Any,
    verify: Check,
    options: Mapping[str, Any] | None,
) -> Any:
    """Return the transformers model, or the pipeline, of a delta's target; see ``sparsedelta.load_model``."""
    if is_of_pipeline(delta):
        return load_pipeline(
            delta,
            base,
            pipeline_class=model_class,
            dtype=dtype,
            device_map=device_map,
            verify=verify,
            options=options,
        )
    check_installed("torch", "transformers")
    with ExitStack() as context:
        checkpoint = context.enter_context(open_base(base, delta))
        tensors = _Tensors(delta, checkpoint, verify)
        with explained(delta, checkpoint):
            folder = context.enter_context(_small_files(delta, checkpoint))
        files = _model_files(delta, folder)
        model = _from_pretrained(
            folder, tensors, files, model_class, dtype, device_map, dict(options or {})
        )
    left = _left_out(delta, files, tensors.rebuilt, model)
    if left:
        shown = ", ".join(f"{row.name!r} of {row.file!r}" for row in left[:_MAX_LISTED])
        more = f" and {len(left) - _MAX_LISTED} more" if len(left) > _MAX_LISTED else ""
        warnings.warn(
            f"the delta changes tensors that the returned model does not hold, {shown}{more}; to use them,"
            " apply the delta and load these tensors from the target",
            stacklevel=3,
        )
    return model


def set_origin(model: Any, name: str, commit: str | None) -> None:
    """Give a transformers model the name and commit of a repository, as transformers does; a pipeline stays as it is."""
    import transformers

    config = getattr(model, "config", None)
    if isinstance(config, transformers.PretrainedConfig):
        config._name_or_path = model.name_or_path = name
        config._commit_hash = commit


def _left_out(
    delta: Delta, files: Collection[str], rebuilt: Collection[TensorKey], model: Any
) -> list[Row]:
    """Return the changed tensors of the target that a model does not hold.

    A tensor with the same name and shape as one that the model holds is not returned. It counts as a copy,
    such as a variant in another dtype.
    """
    held = {(row.name, row.target.shape) for row in delta.tensors if row.key in rebuilt}
    names = find_slots(model)  # all names of tied tensors, of which only one was rebuilt
    return [
        row
        for row in delta.tensors
        if not row.is_copied and (row.name, row.target.shape) not in held
        if row.file not in files or row.name not in names
    ]


def _model_files(delta: Delta, folder: Path) -> set[str]:
    """Return the weight files of the target that hold the model's tensors.

    Args:
        delta: the delta.
        folder: the folder with the target's index files.
    """
    paths = {file.path for file in delta.target.weight_files}
    indexes = {
        path.name: {*read_index(path, path.name, paths).values()}
        for path in folder.glob(f"*{INDEX_SUFFIX}")
    }
    return model_files({path for path in paths if "/" not in path}, indexes)


def model_files(paths: Collection[str], indexes: Mapping[str, Collection[str]]) -> set[str]:
    """Return which weight files of a folder hold the model's tensors.

    Args:
        paths: all weight files in the folder itself, without subfolders.
        indexes: the paths of the shards of each index file in the folder.

    Raises:
        ValueError: the names do not show which files these are.
    """
    by_role: dict[str, list[str]] = defaultdict(list)
    for path, role in roles(paths, indexes).items():
        by_role[role].append(path)
    role = next((role for role in _ROLES if role in by_role), next(iter(by_role), ""))
    if role not in _ROLES and len(by_role) != 1:
        raise _unclear_error("for several purposes" if by_role else "only in subfolders", by_role)
    stems = {path: _stem(path) for path in by_role[role]}
    for index, shards in indexes.items():
        stems |= {path: index.removesuffix(INDEX_SUFFIX) for path in shards if path in stems}
    single = role + WEIGHT_SUFFIX
    if single in stems:  # transformers prefers it to shards
        return {single}
    variants = {*stems.values()}
    if role not in variants and len(variants) != 1:
        raise _unclear_error("in several variants", variants)
    wanted = role if role in variants else variants.pop()
    return {path for path, stem in stems.items() if stem == wanted}


def _stem(path: str) -> str:
    shard = SHARD.fullmatch(path)
    return shard["stem"] if shard else path.removesuffix(WEIGHT_SUFFIX)


def _unclear_error(problem: str, found: Collection[str]) -> ValueError:
    listed = f" ({', '.join(map(repr, sorted(set(found))))})" if found else ""
    return ValueError(
        f"the delta's target has weights {problem}{listed}, and it is not clear which the model uses; apply"
        " the delta and load the files you want from the target"
    )


class _Tensors:
    """Rebuilds tensors of the target on demand, from several threads, and keeps the first error."""

    def __init__(self, delta: Delta, base: Checkpoint, verify: Check) -> None:
        self._delta = delta
        self._base = base
        with explained(delta, base):
            self._found = find_base(delta, base)
        self._verify: Check = verify
        self._pace = Pace(Silent())
        self._lock = threading.Lock()
        self.failure: SparseDeltaError | None = None
        self.rebuilt: set[TensorKey] = set()

    def in_files(self, files: Collection[str]) -> dict[str, _Lazy]:
        """Return the tensors of weight files by name, not yet rebuilt."""
        return {row.name: _Lazy(self, row) for row in self._delta.tensors if row.file in files}

    def rebuild(self, row: Row) -> torch.Tensor:
        """Return a rebuilt tensor."""
        try:
            tensor = self._rebuild(row)
        except SparseDeltaError as error:
            with self._lock:
                self.failure = self.failure or error
            raise
        self.rebuilt.add(row.key)
        return tensor

    def _rebuild(self, row: Row) -> torch.Tensor:
        import torch

        spec = row.target
        dtype = torch_dtype(spec.dtype)
        if dtype is None:
            raise StructureMismatch(
                f"tensor {row.name!r} is {spec.dtype.name}, which torch does not support",
                tensor=row.name,
            )
        buffer = torch.empty(spec.n_bytes, dtype=torch.uint8)
        memory = buffer.numpy().data

        def write(data: memoryview, offset: int) -> None:
            memory[offset : offset + len(data)] = data

        base = self._found.get(row.key)
        with explained(self._delta, self._base):
            rebuild(row, base, self._delta.payload, write, check=self._verify, pace=self._pace)
        return buffer.view(dtype).view(shape_in_torch(dtype, spec.shape))


class _Lazy:
    """A tensor in the interface that transformers reads; ``tensor[...]`` rebuilds it."""

    def __init__(self, tensors: _Tensors, row: Row) -> None:
        self._tensors = tensors
        self._row = row
        self.spec = row.target

    def __getitem__(self, where: EllipsisType) -> torch.Tensor:
        return self._tensors.rebuild(self._row)[where]

    def get_shape(self) -> list[int]:
        """Return the shape; same interface as a slice of safetensors."""
        return list(self.spec.shape)

    def get_dtype(self) -> str:
        """Return the wire dtype; same interface as a slice of safetensors."""
        return self.spec.dtype.name


def _from_pretrained(
    folder: Path,
    tensors: _Tensors,
    files: Collection[str],
    model_class: Any,
    dtype: torch.dtype | str,
    device_map: Any,
    options: dict[str, Any],
) -> Any:
    import transformers

    config = options.pop("config", None)
    trusted = {k: v for k, v in options.items() if k == "trust_remote_code"}
    if config is None:
        try:
            config = transformers.AutoConfig.from_pretrained(
                folder, **{"trust_remote_code": False, **trusted}
            )
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            raise ValueError(
                "the model needs code that comes with it, which is not run; if you trust it, give"
                " options={'trust_remote_code': True}"
            ) from error
    state = tensors.in_files(files)
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or _first_float(state)
    try:
        model = _class_of(config, model_class, trusted).from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, device_map=device_map, **options
        )
    except Exception as error:
        if tensors.failure is not None:
            raise tensors.failure from error
        raise
    if tensors.failure is not None:
        raise tensors.failure
    if (folder / _GENERATION).exists() and hasattr(model, "generation_config"):
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model


def _class_of(config: Any, wanted: Any, trusted: Mapping[str, Any]) -> Any:
    """Return the model class to load: ``wanted``, or the one that the configuration names."""
    import torch
    import transformers

    names = getattr(config, "architectures", None) or []
    found = wanted or next((getattr(transformers, name, None) for name in names), None)
    found = found or transformers.AutoModel
    if issubclass(found, transformers.PreTrainedModel):
        return found
    with torch.device("meta"):  # an auto class: a model without data shows which class it chooses
        return type(found.from_config(config, **trusted))


def _first_float(state: Mapping[str, _Lazy]) -> torch.dtype:
    import torch

    for lazy in state.values():
        dtype = torch_dtype(lazy.spec.dtype)
        if dtype is not None and dtype.is_floating_point:
            return dtype
    return torch.get_default_dtype()


@contextmanager
def _small_files(delta: Delta, base: Checkpoint) -> Iterator[Path]:
    """Yield a folder with the target's configuration, its index files and its Python files."""
    files = [
        file
        for file in delta.target.side_files
        if file.path in (_CONFIG, _GENERATION)
        or file.path.endswith(".py")
        or _is_available_index(file, base)
    ]
    if not any(file.path == _CONFIG for file in files):
        raise ValueError(
            f"the delta's target has no {_CONFIG}, so it is not a transformers model; apply the delta"
            " and load the target with its own library"
        )
    with temporary_folder("config") as folder:
        for file in files:
            (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
            write_side_file(delta, base, file, folder / file.path)
        yield folder


def _is_available_index(file: SideFile, base: Checkpoint) -> bool:
    """Return whether a file is an index at the top of the folder, and is carried or in the base."""
    is_index = file.path.endswith(INDEX_SUFFIX) and "/" not in file.path
    return is_index and (file.stored is not None or file.path in base.side_files)
