"""The tensors of a model with the names and shapes that they have in its saved checkpoint.

Transformers models are converted by transformers' own code, one group of tensors at a time. The inputs and
outputs of each conversion are determined first, with tensors on the meta device.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from sparsedelta._typing import Model
from sparsedelta.dtypes import DTYPES
from sparsedelta.errors import StructureMismatch
from sparsedelta.format.records import TensorSpec
from sparsedelta.live.bits import check_installed, shape_in_file, wire_name
from sparsedelta.live.divided import dtensor
from sparsedelta.live.loading import is_transformers
from sparsedelta.tensors.parallel import n_workers

if TYPE_CHECKING:
    import torch

    State: TypeAlias = dict[str, torch.Tensor]

_N_GROUPS = 4
SAVE_FIRST = "save the model and give the path of the saved checkpoint"


class SavedState:
    """The tensors that would be saved of a model. Tensors are converted when they are read.

    Attributes:
        kind: the model's class, for messages.
        metadata: metadata of the header of a weight file with these tensors.
        specs: dtype and shape of each tensor, by its name in the checkpoint.
        tied: other names that checkpoints may have for a tied tensor, each with its name in ``specs``.

    Raises:
        TypeError: the model is neither a module nor a state dict.
        ModuleNotFoundError: torch is not installed.
        StructureMismatch: a tensor is not a plain tensor, or the saved form of the model is not known.
    """

    def __init__(self, model: Model, *, is_divided: bool = False) -> None:
        """Find out what would be saved.

        Args:
            model: a module or a state dict.
            is_divided: its tensors may be divided among ranks. This is rank 0, which holds some elements of each, and no
                tensor is read.
        """
        check_installed("torch")
        model = unwrapped(model)
        self.kind = type(model).__name__
        self.metadata: dict[str, str] | None = None
        self._state = state_of(model, is_divided=is_divided)
        self._model: Any = None
        # Not converted: from the saved name to the model's name.
        self._renamed = {name: name for name in self._state}
        # Converted: from the saved name to the model's names of the tensors that are converted together.
        self._group_of: dict[str, tuple[str, ...]] = {}
        self.tied: dict[str, str] = {}
        converted: State = {}
        if is_transformers(model):
            self._model, self.metadata = model, {"format": "pt"}
            converted = self._plan(model)
        self.specs = {name: spec_of(self._state[own]) for name, own in self._renamed.items()}
        self.specs |= {name: spec_of(tensor) for name, tensor in converted.items()}
        self._lock = threading.Lock()
        # Tensors are read in order of name, which alternates between the few groups of one layer.
        # Most converted tensors are views, so keeping these groups takes little memory.
        self._converted_group = lru_cache(_N_GROUPS)(self._convert_group)
        self._contiguous = lru_cache(n_workers())(self._make_contiguous)

    def read(self, name: str) -> torch.Tensor:
        """Return a contiguous tensor. It shares the model's memory, unless it is converted or copied."""
        own = self._renamed.get(name)
        if own is not None and self._state[own].is_contiguous():
            return plain(self._state[own])
        return self._contiguous(name)

    def shared(self, names: Collection[str]) -> set[str]:
        """Return ``names`` and all names of tensors that share memory with them, such as tied tensors."""
        memory = {
            memory_of(self._state[own]) for name, own in self._renamed.items() if name in names
        }
        return {
            name for name, own in self._renamed.items() if memory_of(self._state[own]) in memory
        }

    def close(self) -> None:
        """Release the model's tensors."""
        self._converted_group.cache_clear()
        self._contiguous.cache_clear()
        self._state, self._model = {}, None

    def _make_contiguous(self, name: str) -> torch.Tensor:
        own = self._renamed.get(name)
        if own is not None:
            return plain(self._state[own]).contiguous()
        with self._lock:  # one group at a time
            return self._converted_group(self._group_of[name])[name].contiguous()

    def _convert_group(self, group: tuple[str, ...]) -> State:
        import torch

        with torch.no_grad():
            converted = _revert(self._model, {name: plain(self._state[name]) for name in group})
        expected = {name for name, own in self._group_of.items() if own == group}
        if converted.keys() != expected or any(
            spec_of(converted[n]) != self.specs[n] for n in expected
        ):
            _refuse(self.kind, "is not saved as its configuration says")
        return converted

    def _plan(self, model: Any) -> State:
        """Determine which tensors transformers saves, and from which tensors of the model it makes each.

        Returns:
            The tensors that are made by a conversion, on the meta device.
        """
        check_convertible(model)
        for name in model._keys_to_ignore_on_save or ():
            self._state.pop(name, None)
        kept = _without_tied(model, self._state)
        saved_tensors, sources = _traced(model, {name: self._state[name] for name in kept})
        lost = kept - {source for names in sources.values() for source in names}
        if lost:
            _refuse(self.kind, f"is saved without its tensor {min(lost)!r}")
        self._renamed = {
            name: own[0] for name, own in sources.items() if saved_tensors[name] is None
        }
        groups: dict[tuple[str, ...], State] = defaultdict(dict)
        for name, tensor in saved_tensors.items():
            if tensor is not None:
                groups[sources[name]][name] = tensor
        separate = {
            group for group, converted in groups.items() if self._is_separate(group, converted)
        }
        rest = tuple({own: None for group in groups if group not in separate for own in group})
        for group, converted in groups.items():
            self._group_of |= dict.fromkeys(converted, group if group in separate else rest)
        self._add_tied(model, self._state.keys() - kept)
        return {name: tensor for converted in groups.values() for name, tensor in converted.items()}

    def _is_separate(self, group: tuple[str, ...], converted: State) -> bool:
        """Return whether the conversion of this group alone gives exactly these tensors."""
        try:
            found, _ = _traced(self._model, {name: self._state[name] for name in group})
        except StructureMismatch:
            return False
        specs = {name: spec_of(tensor) for name, tensor in found.items() if tensor is not None}
        return specs == {name: spec_of(tensor) for name, tensor in converted.items()}

    def _add_tied(self, model: Any, left: Collection[str]) -> None:
        saved_of = {memory_of(self._state[own]): name for name, own in self._renamed.items()}
        for own in left:
            converted, _ = _traced(model, {own: self._state[own]})
            saved = saved_of.get(memory_of(self._state[own]))
            if saved is not None:
                self.tied |= {name: saved for name, tensor in converted.items() if tensor is None}


def unwrapped(model: Any) -> Any:
    """Return a model without the wrappers of torch.compile and data parallelism."""
    import torch

    if isinstance(model, torch.nn.Module):
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel):
            inner = model.module
        return model if inner is None else unwrapped(inner)
    if isinstance(model, Mapping):
        return model
    raise TypeError(
        f"a {type(model).__name__} is given, expected a path, a state dict or a torch.nn.Module"
    )


def state_of(model: Any, *, is_divided: bool = False) -> State:
    """Return the tensors that would be saved of a module or state dict, detached; see ``SavedState``.

    Raises:
        StructureMismatch: a tensor is not a plain tensor.
    """
    import torch

    state = dict(model if isinstance(model, Mapping) else model.state_dict())
    described: dict[object, torch.Tensor] = {}
    for name, tensor in state.items():
        problem = None
        if is_divided and isinstance(tensor, torch.Tensor) and dtensor(tensor) is not None:
            memory = memory_of(dtensor(tensor)._local_tensor)
            tensor = described.setdefault(memory, _described(tensor))
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            problem = f"is a {type(tensor).__name__}, expected a tensor under a name"
        elif tensor.is_meta:
            problem = "holds no data (it is on the meta device)"
        elif dtensor(tensor) is not None:
            problem = (
                "is divided among ranks (DTensor), and all ranks have to make its delta together; call"
                " sparsedelta.distributed.diff_shards or ShardSnapshot on all ranks, or publish it (RankPublisher)"
            )
        elif type(tensor.data) is not torch.Tensor or tensor.layout != torch.strided:
            problem = f"is a {type(tensor.data).__name__} ({tensor.layout}), not a plain tensor"
        elif wire_name(tensor.dtype) not in DTYPES:
            problem = f"is {tensor.dtype}, which cannot be saved"
        if problem:
            raise StructureMismatch(f"tensor {name!r} {problem}", tensor=str(name))
        state[name] = tensor.detach()
    for device in {tensor.device for tensor in state.values() if tensor.is_cuda}:
        torch.cuda.synchronize(device)  # the tensors are read on other streams
    return state


def _described(tensor: torch.Tensor) -> torch.Tensor:
    """Return a plain tensor of the same shape and dtype, with memory for one element: no operation asks other ranks."""
    import torch

    return torch.empty(1, dtype=tensor.dtype).expand(tensor.shape)


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    """Return the dtype and shape of a tensor."""
    return TensorSpec(DTYPES[wire_name(tensor.dtype)], shape_in_file(tensor.dtype, tensor.shape))


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor without the lazy conjugation and negation of torch."""
    return tensor.detach().resolve_conj().resolve_neg()


def memory_of(tensor: torch.Tensor) -> object:
    """Return where the elements of a tensor are: equal for tied tensors."""
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()


def _refuse(kind: str, problem: str) -> NoReturn:
    raise StructureMismatch(f"the {kind} {problem}; {SAVE_FIRST}")


def check_convertible(model: Any) -> None:
    """Check that the model holds what a checkpoint of it holds.

    Raises:
        StructureMismatch: it is quantized, or has adapters.
    """
    kind = type(model).__name__
    if getattr(model, "hf_quantizer", None) is not None:
        _refuse(kind, "is quantized")
    if getattr(model, "_hf_peft_config_loaded", False):
        _refuse(kind, "has adapters, and only these would be saved")


def _without_tied(model: Any, state: State) -> set[str]:
    """Return the names of the tensors that are saved. Of tied tensors, transformers saves one."""
    try:
        from transformers.modeling_utils import remove_tied_weights_from_state_dict

        return {*remove_tied_weights_from_state_dict(dict(state), model)}
    except (ImportError, RuntimeError) as error:
        raise StructureMismatch(
            f"transformers cannot save the tied tensors of the {type(model).__name__}: {error}"
        ) from error


def _revert(model: Any, state: State) -> State:
    """Return the tensors that transformers saves for these tensors of a model."""
    from transformers.core_model_loading import revert_weight_conversion

    converted: State = revert_weight_conversion(model, state)
    return converted


def _traced(
    model: Any, state: State
) -> tuple[dict[str, torch.Tensor | None], dict[str, tuple[str, ...]]]:
    """Return what transformers saves for these tensors, determined on the meta device.

    Returns:
        Each saved tensor by its saved name, without data, or None if the tensor is only renamed; and for
        each saved name the names of the tensors that it is made from.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    given = {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in state.items()}
    known: dict[
        int, tuple[torch.Tensor, dict[str, None]]
    ] = {  # keeps the tensors alive, so that no id is used twice
        id(tensor): (tensor, {name: None}) for name, tensor in given.items()
    }

    class Trace(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            inputs = [
                known[id(leaf)][1] for leaf in tree_leaves((args, kwargs)) if id(leaf) in known
            ]
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    before = known.get(id(leaf), (leaf, {}))[1]
                    known[id(leaf)] = leaf, before | {n: None for one in inputs for n in one}
            return result

    kind = type(model).__name__
    try:
        with torch.no_grad(), Trace():  # type: ignore[no-untyped-call]
            converted = _revert(model, given)
    except Exception as error:
        raise StructureMismatch(
            f"the conversion of the {kind} for saving needs its data ({error}); {SAVE_FIRST}"
        ) from error
    renamed = {id(tensor) for tensor in given.values()}
    return (
        {name: None if id(tensor) in renamed else tensor for name, tensor in converted.items()},
        {name: tuple(known[id(tensor)][1]) for name, tensor in converted.items()},
    )
