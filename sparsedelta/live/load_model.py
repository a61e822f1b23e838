"""``load_model``: a transformers model with a delta applied, each tensor made when it is wanted.

Nothing but small configuration files is written, and no tensor is held twice.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any

from sparsedelta._typing import AnyPath, TorchDType
from sparsedelta.errors import SparseDeltaError, StructureMismatch
from sparsedelta.files.checkpoint import Checkpoint
from sparsedelta.files.layout import file_prefixes, rows_by_file
from sparsedelta.files.side_files import read_side_file, write_side_file
from sparsedelta.format.delta import Delta
from sparsedelta.format.records import TensorDelta, TensorSpec
from sparsedelta.live.bits import torch_dtype
from sparsedelta.ops.base_check import check_structure, explain_mismatch, included
from sparsedelta.progress import Silent
from sparsedelta.tensors.parallel import Pace
from sparsedelta.tensors.rebuild import BaseDiffers, Check, rebuild

if TYPE_CHECKING:
    import torch

_CONFIG = "config.json"
_GENERATION = "generation_config.json"


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
    """Return the transformers model of a delta's target; see ``sparsedelta.load_model``."""
    with ExitStack() as context:
        checkpoint = context.enter_context(Checkpoint(base, include=included(delta), whole=False))
        delta.payload.check()
        check_structure(delta, checkpoint)
        folder = context.enter_context(_small_files(delta, checkpoint))
        tensors = _Tensors(delta, checkpoint, verify)
        return _from_pretrained(
            folder, tensors, model_class, dtype, device_map, dict(options or {})
        )


class _Tensors:
    """The target's tensors, made on demand from several threads; keeps the first failure."""

    def __init__(self, delta: Delta, base: Checkpoint, verify: Check) -> None:
        self._delta = delta
        self._base = base
        self._verify: Check = verify
        self._pace = Pace(Silent())
        self._lock = threading.Lock()
        self.failure: SparseDeltaError | None = None

    def all(self) -> dict[str, _Lazy]:
        """Return the tensors of the primary weight set by their own names."""
        prefixes = file_prefixes(self._delta, partial(read_side_file, self._delta, self._base))
        return {
            row.name: _Lazy(self, row, row.target)
            for file, rows in rows_by_file(self._delta)
            for row in rows
            if row.target and not prefixes[file.path]
        }

    def make(self, row: TensorDelta, spec: TensorSpec) -> torch.Tensor:
        """Return one tensor."""
        try:
            return self._make(row, spec)
        except SparseDeltaError as error:
            with self._lock:
                self.failure = self.failure or error
            raise

    def _make(self, row: TensorDelta, spec: TensorSpec) -> torch.Tensor:
        import torch

        dtype = torch_dtype(spec.dtype)
        if dtype is None:
            raise StructureMismatch(
                f"tensor {row.name!r} is {spec.dtype.name}, which torch does not have",
                tensor=row.name,
            )
        buffer = torch.empty(spec.n_bytes, dtype=torch.uint8)
        memory = buffer.numpy().data

        def write(data: memoryview, offset: int) -> None:
            memory[offset : offset + len(data)] = data

        base = self._base.tensors.get(row.name) if row.base else None
        try:
            rebuild(row, base, self._delta.payload, write, check=self._verify, pace=self._pace)
        except BaseDiffers as error:
            raise explain_mismatch(self._delta, self._base, row, error.digest) from None
        return buffer.view(dtype).view(spec.shape)


class _Lazy:
    """A tensor as transformers takes it up: ``tensor[...]`` makes it."""

    def __init__(self, tensors: _Tensors, row: TensorDelta, spec: TensorSpec) -> None:
        self._tensors = tensors
        self._row = row
        self.spec = spec

    def __getitem__(self, where: EllipsisType) -> torch.Tensor:
        return self._tensors.make(self._row, self.spec)[where]

    def get_shape(self) -> list[int]:
        """Return the shape, as a slice of safetensors does."""
        return list(self.spec.shape)

    def get_dtype(self) -> str:
        """Return the wire dtype, as a slice of safetensors does."""
        return self.spec.dtype.name


def _from_pretrained(
    folder: Path,
    tensors: _Tensors,
    model_class: Any,
    dtype: torch.dtype | str,
    device_map: Any,
    options: dict[str, Any],
) -> Any:
    import transformers

    config = options.pop("config", None)
    trusted = {k: v for k, v in options.items() if k == "trust_remote_code"}
    if config is None:
        config = transformers.AutoConfig.from_pretrained(folder, **trusted)
    state = tensors.all()
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
    """Return the class of model that is wanted, or that the configuration names."""
    import torch
    import transformers

    names = getattr(config, "architectures", None) or []
    found = wanted or next((getattr(transformers, name, None) for name in names), None)
    found = found or transformers.AutoModel
    if issubclass(found, transformers.PreTrainedModel):
        return found
    with torch.device("meta"):  # an auto class: only a model of its choice tells which it chooses
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
    """Yield a folder with the target's configuration and, if it has any, code."""
    files = [
        file
        for file in delta.target.side_files
        if file.path in (_CONFIG, _GENERATION) or file.path.endswith(".py")
    ]
    if not any(file.path == _CONFIG for file in files):
        raise ValueError(
            f"the delta's target has no {_CONFIG}, so it is not a transformers model; apply the delta"
            " and load the target by other means"
        )
    with tempfile.TemporaryDirectory(prefix="sparsedelta-") as name:
        folder = Path(name)
        for file in files:
            (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
            write_side_file(delta, base, file, folder / file.path)
        yield folder
