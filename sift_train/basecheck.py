"""Checks that a checkpoint holds the weights that a model had before training, bit for bit.

Tensors with the same name are compared; a model's prefix may be missing in a name. A tensor that
only one side has, or that has another shape there, is not an error: the delta records such changes.
But if no name is the same, or most have another shape, the checkpoint is that of another model.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sift_train.bits import SLICE, bits_of
from sift_train.conversion import as_saved, groups_of
from sift_train.masters import SparseParameter
from sift_train.pipelines import is_pipeline, part_of
from sift_train.targets import names_of_parameters
from sift_train.weightfiles import dtype_of, weights_of

if TYPE_CHECKING:
    from sift_train.sift import SIFT

logger = logging.getLogger(__name__)

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")


def check_weights(base: Path) -> None:
    """Check that a checkpoint has weights as safetensors.

    Raises:
        ValueError: the folder has no safetensors file, or the path is a file of another kind.
    """
    if not base.is_dir():
        with ExitStack() as stack:
            _open(base, stack)
    elif not any(base.rglob("*.safetensors")):
        others = sorted(path.name for path in base.iterdir() if path.suffix in _PICKLED)
        only = f", only {', '.join(others)}" if others else ""
        raise ValueError(
            f"base '{base}' has no .safetensors file{only}; load its model and save it with "
            "save_pretrained(), which writes one"
        )


def check_base(model: nn.Module, base: Path, sift: SIFT | None = None) -> None:
    """Check that a checkpoint holds the values of the model's parameters before training.

    Args:
        model: the model, trained or not.
        base: a folder or a safetensors file; the folder of a pipeline has the model in a subfolder. Its
            tensors are compared in the model's dtype.
        sift: the SIFT that trains the model; it knows the first values of the trained components.

    Raises:
        ValueError: a tensor differs, no tensor has the name of a parameter, or a file is not a safetensors file.
    """
    base = model_folder(model, base, sift)
    parts = _parts(sift)
    named = names_of_parameters(model)
    names = [name for same in named.values() for name in same]
    held = tensor_places(base, dtype_of(model))
    renamed = names_in_base(model, names, base)
    if not held.keys() & {*names, *renamed.values()}:
        renamed = _without_prefix(names, held)
    own: dict[str, Tensor] = {}
    for parameter, same in named.items():
        # A tied one is compared under one name only. Under the other names, a base may hold other values.
        in_base = [renamed.get(name, name) for name in same]
        own[next((name for name in in_base if name in held), in_base[0])] = parameter

    def before(name: str) -> Tensor:
        return _first_values(own[name], parts.get(id(own[name])))

    of_other_shape = []
    dtypes: Counter[tuple[torch.dtype, torch.dtype]] = Counter()
    for name, tensor in _tensors(held, own.keys() & held.keys()):
        if not _compare(base, name, tensor, own[name], parts.get(id(own[name]))):
            of_other_shape.append(name)
        elif tensor.dtype != own[name].dtype:
            dtypes[tensor.dtype, own[name].dtype] += 1
    if 2 * len(of_other_shape) > len(own):  # a resized embedding or a new head are few
        raise ValueError(
            f"base '{base}' is not the checkpoint of this model: {len(of_other_shape)} of its {len(own)} parameters,"
            f" such as {min(of_other_shape)!r}, have other shapes there; give the checkpoint that the model was"
            " loaded from, or leave base out"
        )
    for (theirs, ours), n in dtypes.most_common(1):
        logger.warning(
            "base '%s' holds %d of the model's %d parameters as %s, and the model as %s, so the delta holds them whole; convert"
            " the model's to %s, or give a base that holds them as %s",
            base, n, len(own), theirs, ours, theirs, ours,
        )  # fmt: skip
    missing = own.keys() - held.keys()
    if not missing or (held and held.keys() <= own.keys()):
        return
    compared = set()
    for group in groups_of(missing):
        made = as_saved(model, {name: partial(before, name) for name in group})
        renamed = names_in_base(model, made, base)
        made = {renamed.get(name, name): tensor for name, tensor in made.items()}
        for name, tensor in _tensors(held, made.keys() & held.keys()):
            _compare(base, name, tensor, made[name])
        if made and made.keys() <= held.keys():
            compared |= group
    if missing - compared == own.keys() and held.keys().isdisjoint(model.state_dict()):
        raise ValueError(
            f"base '{base}' is not the checkpoint of this model: none of its {len(held)} tensors"
            f"{f', such as {min(held)!r},' if held else ''} has the name of one of the model's {len(own)} parameters, such as"
            f" {min(own)!r}; give the checkpoint that the model was loaded from, or leave base out"
        )
    if missing - compared:
        logger.warning(
            "base '%s' has no tensors of the names of %d of the model's %d parameters, such as %r; these"
            " were not compared with it",
            base,
            len(missing - compared),
            len(own),
            min(missing - compared),
        )


def _compare(
    base: Path, name: str, held: Tensor, own: Tensor, part: SparseParameter | None = None
) -> bool:
    """Raise ValueError if a tensor of the base differs from one of the model before training; return whether they have one shape."""
    if held.shape != own.shape:
        return False
    n_different = _n_different(held, own, part)
    if n_different:
        raise ValueError(
            f"base '{base}' differs from the model before training: {n_different:,} of "
            f"{own.numel():,} components of {name!r} differ; give the checkpoint that the "
            "model was loaded from, or leave base out"
        )
    return True


def _n_different(held: Tensor, own: Tensor, part: SparseParameter | None) -> int:
    """Return how many elements differ from those before training; ``part`` knows the first values of the trained ones."""
    n_different, flat = 0, own.detach().reshape(-1)
    first_values = part.first_values() if part else None
    for number, found in enumerate(held.reshape(-1).split(SLICE)):
        start = number * SLICE
        end = start + len(found)
        before = first_values(start, end) if first_values else flat[start:end].cpu()
        n_different += int((bits_of(found.to(before.dtype)) != bits_of(before)).sum())
    return n_different


def _parts(sift: SIFT | None) -> dict[int, SparseParameter]:
    return {} if sift is None else {id(p.parameter): p for p in sift.sparse_mapping.values()}


def names_in_base(model: nn.Module, names: Iterable[str], base: Path) -> dict[str, str]:
    """Return the names in a base that differ from the model's names by the model's prefix.

    A model with a head puts a prefix before the names of the other tensors. A base saved without a
    head has names without the prefix, and transformers loads both. The reverse also occurs.

    Args:
        model: a module; the prefix is its ``base_model_prefix``, which transformers models have.
        names: names of its tensors.
        base: a folder or a safetensors file.

    Returns:
        The base's name by the model's name, for the names that differ.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    if prefix == ".":
        return {}
    base_names = set(tensor_names(base))
    found = {}
    for name in names:
        other = name.removeprefix(prefix) if name.startswith(prefix) else prefix + name
        if name not in base_names and other in base_names:
            found[name] = other
    return found


def _without_prefix(names: Iterable[str], held: Iterable[str]) -> dict[str, str]:
    """Return the base's names for the tensors of a module that contains the base's model, such as a SentenceTransformer."""
    known = set(held)
    counts: Counter[str] = Counter()
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for name in names:
        for at, character in enumerate(name):
            if character == "." and name[at + 1 :] in known:
                counts[name[: at + 1]] += 1
                found[name[: at + 1]][name] = name[at + 1 :]
    return found[counts.most_common(1)[0][0]] if counts else {}


def tensor_names(base: Path) -> Iterator[str]:
    """Yield the names of a checkpoint's tensors."""
    yield from tensor_places(base)


def tensor_places(base: Path, dtype: torch.dtype | None = None) -> dict[str, Path]:
    """Return the file that each tensor of a checkpoint is in, by its name; see ``weight_files``."""
    places: dict[str, Path] = {}
    for path in weight_files(base, dtype):
        with ExitStack() as stack:
            places |= dict.fromkeys(_open(path, stack).keys(), path)
    return places


def weight_files(base: Path, dtype: torch.dtype | None = None) -> Sequence[Path]:
    """Return the files of a checkpoint that hold a model; see ``weights_of``."""
    return weights_of(base, dtype).files if base.is_dir() else [base]


def model_folder(model: nn.Module, base: Path, sift: SIFT | None = None) -> Path:
    """Return the folder with a model's weights: the base, or a subfolder of it if the base is a pipeline.

    Raises:
        ValueError: the pipeline has no such model, or it is not clear which one it is.
    """
    if not is_pipeline(base):
        return base

    def n_equal(folder: Path) -> int:
        parts = _parts(sift)
        held = tensor_places(folder, dtype_of(model))
        own = dict(model.named_parameters())
        return sum(
            _n_different(tensor, own[name], parts.get(id(own[name]))) == 0
            for name, tensor in _tensors(held, own.keys() & held.keys())
            if tensor.shape == own[name].shape
        )

    return base / part_of(model, base, n_equal)


def _first_values(parameter: Tensor, part: SparseParameter | None) -> Tensor:
    """Return a parameter's values from before training, on its device."""
    return parameter.detach() if part is None else part.before_training


def _tensors(places: Mapping[str, Path], wanted: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    by_file: dict[Path, list[str]] = defaultdict(list)
    for name in wanted:
        by_file[places[name]].append(name)
    for path, names in by_file.items():
        with ExitStack() as stack:
            file = _open(path, stack)
            for name in sorted(names):
                yield name, file.get_tensor(name)


def _open(path: Path, stack: ExitStack) -> Any:
    try:
        return stack.enter_context(safe_open(path, framework="pt"))
    except SafetensorError as error:
        raise ValueError(
            f"'{path}' is not a safetensors file, or is incomplete: {error}"
        ) from error


class Reader:
    """Reads single tensors of safetensors files, and opens each file once.

    Args:
        stack: closes the files.
    """

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._files: dict[Path, Any] = {}

    def __call__(self, path: Path, name: str) -> Tensor:
        """Return a tensor of a file.

        Raises:
            ValueError: the file is not a safetensors file.
        """
        if path not in self._files:
            self._files[path] = _open(path, self._stack)
        tensor: Tensor = self._files[path].get_tensor(name)
        return tensor
