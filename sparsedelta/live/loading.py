"""``load_model``: a transformers model with a delta applied, each tensor made when it is wanted.

Nothing but small configuration files is written, and no tensor is held twice.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any

from sparsedelta.basecheck import check_structure, explain_mismatch
from sparsedelta.checkpoint import Checkpoint
from sparsedelta.container import load
from sparsedelta.delta import Delta, TensorDelta, TensorSpec
from sparsedelta.errors import SparseDeltaError, StructureMismatch
from sparsedelta.layout import file_prefixes, rows_by_file
from sparsedelta.live.bits import torch_dtype
from sparsedelta.parallel import Pace
from sparsedelta.progress import Silent
from sparsedelta.rebuild import BaseDiffers, Check, rebuild
from sparsedelta.sidefiles import read_side_file, write_side_file

if TYPE_CHECKING:
    import torch

_CONFIG = "config.json"
_GENERATION = "generation_config.json"


def load_model(
    delta: str | os.PathLike[str] | Delta,
    *,
    base: str | os.PathLike[str] | None = None,
    model_class: Any = None,
    dtype: torch.dtype | str = "auto",
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
        FormatError: the delta cannot be read, or contradicts itself.
        MismatchError: ``base`` is not its base.
        RemoteError: the repository or its base cannot be had.
        ValueError: ``base`` is missing or superfluous, or the target has no configuration of a transformers model.
    """
    with ExitStack() as context:
        opened, place = _opened(delta, base, context)
        checkpoint = context.enter_context(Checkpoint(place, whole=False))
        opened.payload.check()
        check_structure(opened, checkpoint)
        folder = context.enter_context(_small_files(opened, checkpoint))
        tensors = _Tensors(opened, checkpoint, verify)
        return _from_pretrained(
            folder, tensors, model_class, dtype, device_map, dict(options or {})
        )


def _opened(
    delta: str | os.PathLike[str] | Delta,
    base: str | os.PathLike[str] | None,
    context: ExitStack,
) -> tuple[Delta, str | os.PathLike[str]]:
    """Return the delta and where its base is, fetched or as given."""
    reference = None
    if isinstance(delta, str) and not os.path.lexists(delta) and not delta.endswith(".sd"):
        from sparsedelta.hub.references import parse_reference

        reference = parse_reference(delta)
    if reference is not None:
        from sparsedelta.hub.sources import fetched

        if base is not None:
            raise ValueError(f"'{delta}' is a repository, which names its base; leave base out")
        return context.enter_context(fetched(reference))
    if base is None:
        raise ValueError("the delta's base is not given; give its folder as base")
    opened = delta if isinstance(delta, Delta) else context.enter_context(load(_file(delta)))
    return opened, base


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
            f"the delta's target has no {_CONFIG}, so it is no transformers model; apply the delta"
            " and load the target by other means"
        )
    with tempfile.TemporaryDirectory(prefix="sparsedelta-") as name:
        folder = Path(name)
        for file in files:
            (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
            write_side_file(delta, base, file, folder / file.path)
        yield folder


def _file(path: str | os.PathLike[str]) -> Path:
    """Return the delta at a path: the file itself, or the only one in a folder."""
    if not Path(path).is_dir():
        return Path(path)
    found = sorted(Path(path).glob("*.sd"))
    if len(found) != 1:
        raise ValueError(
            f"folder '{path}' holds {len(found)} .sd files, expected one; name the file"
        )
    return found[0]
