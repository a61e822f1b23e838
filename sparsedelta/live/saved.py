"""A model's tensors as its checkpoint has them: under the names and in the layout in which they are saved.

A transformers model is converted by transformers itself, one group of tensors at a time. What a conversion
needs and makes is found out beforehand, on tensors without data.
"""

from __future__ import annotations

import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from sparsedelta._typing import Model
from sparsedelta.dtypes import DTYPES
from sparsedelta.errors import StructureMismatch
from sparsedelta.format.records import TensorSpec
from sparsedelta.live.bits import check_installed, wire_name
from sparsedelta.tensors.parallel import n_workers

if TYPE_CHECKING:
    import torch

    State: TypeAlias = dict[str, torch.Tensor]

_N_GROUPS = 4
_INSTEAD = "save it, and give the path of what was saved"


class SavedState:
    """What is saved of a model: nothing is copied until it is read.

    Attributes:
        kind: what messages call the model.
        metadata: of the header of a file with these tensors.
        specs: dtype and shape of each tensor, by its name in a checkpoint.
        tied: names under which checkpoints may have a tensor once more, and its name in ``specs``.

    Raises:
        TypeError: the model is neither a module nor a state dict.
        ModuleNotFoundError: torch is not installed.
        StructureMismatch: a tensor holds no plain data, or how the model is saved is not known.
    """

    def __init__(self, model: Model) -> None:
        check_installed("torch")
        model = _unwrapped(model)
        self.kind = type(model).__name__
        self.metadata: dict[str, str] | None = None
        self._state = _state_of(model)
        self._model: Any = None
        self._renamed = {name: name for name in self._state}  # from a saved name to the model's
        self._group_of: dict[str, tuple[str, ...]] = {}  # from a saved name to what it is made of
        self.tied: dict[str, str] = {}
        made: State = {}
        if _is_transformers(model):
            self._model, self.metadata = model, {"format": "pt"}
            made = self._plan(model)
        self.specs = {name: _spec(name, self._state[own]) for name, own in self._renamed.items()}
        self.specs |= {name: _spec(name, tensor) for name, tensor in made.items()}
        self._lock = threading.Lock()
        # Names in order take turns between the few groups of one layer; most of what is made are views.
        self._converted = lru_cache(_N_GROUPS)(self._convert)
        self._laid_out = lru_cache(n_workers())(self._lay_out)

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor, contiguous; it is the model's own unless it has to be converted."""
        own = self._renamed.get(name)
        if own is not None and self._state[own].is_contiguous():
            return _plain(self._state[own])
        return self._laid_out(name)

    def shared(self, names: Collection[str]) -> set[str]:
        """Return all names of the tensors that are in the memory of these, such as tied ones in a state dict."""
        places = {_place(self._state[own]) for name, own in self._renamed.items() if name in names}
        return {name for name, own in self._renamed.items() if _place(self._state[own]) in places}

    def close(self) -> None:
        """Let the model's tensors go."""
        self._converted.cache_clear()
        self._laid_out.cache_clear()
        self._state, self._model = {}, None

    def _lay_out(self, name: str) -> torch.Tensor:
        own = self._renamed.get(name)
        if own is not None:
            return _plain(self._state[own]).contiguous()
        with self._lock:  # one group at a time
            return self._converted(self._group_of[name])[name].contiguous()

    def _convert(self, group: tuple[str, ...]) -> State:
        import torch

        with torch.no_grad():
            made = _revert(self._model, {name: _plain(self._state[name]) for name in group})
        expected = {name for name, own in self._group_of.items() if own == group}
        if made.keys() != expected or any(_spec(n, made[n]) != self.specs[n] for n in expected):
            _refuse(self.kind, "is saved otherwise than its configuration says")
        return made

    def _plan(self, model: Any) -> State:
        """Find out what transformers saves of a model, and of which tensors it makes it.

        Returns what is not the model's own, without data.
        """
        _check_convertible(model)
        for name in model._keys_to_ignore_on_save or ():
            self._state.pop(name, None)
        kept = _without_tied(model, self._state)
        whole, sources = _traced(model, {name: self._state[name] for name in kept})
        lost = kept - {source for names in sources.values() for source in names}
        if lost:
            _refuse(self.kind, f"is saved without its tensor {min(lost)!r}")
        self._renamed = {name: own[0] for name, own in sources.items() if whole[name] is None}
        groups: dict[tuple[str, ...], State] = defaultdict(dict)
        for name, tensor in whole.items():
            if tensor is not None:
                groups[sources[name]][name] = tensor
        alone = {group for group, made in groups.items() if self._makes(group, made)}
        rest = tuple({own: None for group in groups if group not in alone for own in group})
        for group, made in groups.items():
            self._group_of |= dict.fromkeys(made, group if group in alone else rest)
        self._add_tied(model, self._state.keys() - kept)
        return {name: tensor for made in groups.values() for name, tensor in made.items()}

    def _makes(self, group: tuple[str, ...], made: State) -> bool:
        """Return whether just these tensors are made of just those of the model."""
        try:
            found, _ = _traced(self._model, {name: self._state[name] for name in group})
        except StructureMismatch:
            return False
        specs = {name: _spec(name, tensor) for name, tensor in found.items() if tensor is not None}
        return specs == {name: _spec(name, tensor) for name, tensor in made.items()}

    def _add_tied(self, model: Any, left: Collection[str]) -> None:
        saved_of = {_place(self._state[own]): name for name, own in self._renamed.items()}
        for own in left:
            made, _ = _traced(model, {own: self._state[own]})
            saved = saved_of.get(_place(self._state[own]))
            if saved is not None:
                self.tied |= {name: saved for name, tensor in made.items() if tensor is None}


def _unwrapped(model: Any) -> Any:
    """Return a model without what torch.compile and data parallelism put around it."""
    import torch

    if isinstance(model, torch.nn.Module):
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel):
            inner = model.module
        return model if inner is None else _unwrapped(inner)
    if isinstance(model, Mapping):
        return model
    raise TypeError(
        f"a {type(model).__name__} is given, expected a path, a state dict or a torch.nn.Module"
    )


def _state_of(model: Any) -> State:
    import torch

    state = dict(model if isinstance(model, Mapping) else model.state_dict())
    for name, tensor in state.items():
        problem = None
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            problem = f"is a {type(tensor).__name__}, expected a tensor under a name"
        elif tensor.is_meta:
            problem = "holds no data (it is on the meta device)"
        elif type(tensor.data) is not torch.Tensor or tensor.layout != torch.strided:
            problem = f"is a {type(tensor.data).__name__} ({tensor.layout}), not a plain tensor"
        elif wire_name(tensor.dtype) not in DTYPES:
            problem = f"is {tensor.dtype}, which cannot be saved"
        if problem:
            raise StructureMismatch(f"tensor {name!r} {problem}", tensor=str(name))
        state[name] = tensor.detach()
    for device in {tensor.device for tensor in state.values() if tensor.is_cuda}:
        torch.cuda.synchronize(device)  # they are read on other streams
    return state


def _spec(name: str, tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(DTYPES[wire_name(tensor.dtype)], tuple(tensor.shape))


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().resolve_conj().resolve_neg()


def _place(tensor: torch.Tensor) -> object:
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()


def _refuse(kind: str, problem: str) -> NoReturn:
    raise StructureMismatch(f"the {kind} {problem}; {_INSTEAD}")


def _is_transformers(model: Any) -> bool:
    # A model of transformers cannot be there before transformers is.
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def _check_convertible(model: Any) -> None:
    kind = type(model).__name__
    if getattr(model, "hf_quantizer", None) is not None:
        _refuse(kind, "is quantized")
    if getattr(model, "_hf_peft_config_loaded", False):
        _refuse(kind, "has adapters, of which alone a checkpoint would be made")


def _without_tied(model: Any, state: State) -> set[str]:
    """Return the names that transformers keeps of tensors that share memory, and all others."""
    try:
        from transformers.modeling_utils import remove_tied_weights_from_state_dict

        return {*remove_tied_weights_from_state_dict(dict(state), model)}
    except (ImportError, RuntimeError) as error:
        raise StructureMismatch(
            f"transformers does not save the tied tensors of the {type(model).__name__}: {error}"
        ) from error


def _revert(model: Any, state: State) -> State:
    """Return what transformers saves of tensors of a model."""
    from transformers.core_model_loading import revert_weight_conversion

    made: State = revert_weight_conversion(model, state)
    return made


def _traced(
    model: Any, state: State
) -> tuple[dict[str, torch.Tensor | None], dict[str, tuple[str, ...]]]:
    """Return what transformers saves of tensors, without data, and the names of those it is made of.

    A tensor that is only renamed is None.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    given = {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in state.items()}
    known: dict[int, tuple[torch.Tensor, dict[str, None]]] = {  # with the tensor, whose id is used
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
            made = _revert(model, given)
    except Exception as error:
        raise StructureMismatch(
            f"how transformers saves the {kind} cannot be told without its data ({error}); {_INSTEAD}"
        ) from error
    renamed = {id(tensor) for tensor in given.values()}
    return (
        {name: None if id(tensor) in renamed else tensor for name, tensor in made.items()},
        {name: tuple(known[id(tensor)][1]) for name, tensor in made.items()},
    )
