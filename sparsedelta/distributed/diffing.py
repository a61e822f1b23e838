"""``diff_shards``: one delta of a model that the ranks of ``torch.distributed`` divide, without gathering a tensor.

Each rank compares what it holds with the base on disk. A chunk is coded by one of the ranks that hold elements of it, and
the digests of a tensor are computed by one rank, from the base and the coded chunks. Rank 0 joins the chunks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist

from sparsedelta._typing import JSON, AnyPath
from sparsedelta.distributed.shard_rows import ShardRows
from sparsedelta.errors import StructureMismatch
from sparsedelta.files.checkpoint import Checkpoint
from sparsedelta.files.side_files import digest_file
from sparsedelta.format.delta import Delta
from sparsedelta.format.records import Base, Target, TensorKey
from sparsedelta.format.spool import new_payload
from sparsedelta.live.bits import shape_in_file, wire_name
from sparsedelta.live.wire import Wire
from sparsedelta.ops.diff import check_json, coder_of, describe_files
from sparsedelta.tensors.compare_tasks import Coder


def diff_shards(
    base: AnyPath,
    model: torch.nn.Module | Mapping[str | TensorKey, torch.Tensor],
    *,
    base_id: str | None = None,
    values: str = "ulp",
    level: str = "default",
    standalone: bool = False,
    strict: bool = True,
    info: Mapping[str, JSON] | None = None,
    spool_dir: str | None = None,
    group: dist.ProcessGroup | None = None,
) -> Delta | None:
    """Return on rank 0 the delta from ``base`` to a model that FSDP2 or tensor parallelism divides; None on the others.

    All ranks call this at the same time, with the same arguments, and see the base. The target is the base with the
    model's tensors in place of its own. The delta has the bytes that ``sparsedelta.diff`` makes of it in one process. No
    rank gathers a tensor: a rank needs memory for the changed elements of one chunk (16,777,216 elements) twice, and to
    code them. The coded chunks are in temporary files if they do not fit in 32 MiB. The model must not change during the
    call.

    Args:
        base: a safetensors file or a folder, in the same state on all ranks.
        model: a module, or tensors by their names in the base; or by file and name, if several files have a name. Tensors
            may be DTensors. A tensor that is not divided must be the same on all ranks.
        base_id: see ``sparsedelta.diff``.
        values: the same.
        level: the same.
        standalone: the same.
        strict: the model must have all tensors of the base. If false, those that it lacks are the base's.
        info: free JSON to record; that of rank 0 counts.
        spool_dir: folder for temporary files; None for the system's.
        group: the ranks; None: all.

    Raises:
        StructureMismatch: the model has a tensor that the base lacks, or with another dtype or shape; or the ranks do not
            hold each element.
        CheckpointError: the base cannot be read.
        SparseDeltaError: another rank has failed.
        ValueError: an option is wrong or differs between the ranks.
    """
    wire = Wire(group)
    with new_payload(spool_dir) as payload, ExitStack() as stack:

        def begun() -> tuple[Checkpoint, dict[int, torch.Tensor], Coder, Mapping[str, JSON]]:
            checked = check_json(info or {}, "info")
            check_json({"base_id": base_id}, "base_id")
            coder = coder_of(values=values, level=level, standalone=standalone)
            checkpoint = stack.enter_context(Checkpoint(base, include=()))
            return checkpoint, _found(checkpoint, model, strict=strict), coder, checked

        checkpoint, found, coder, checked = wire.together(begun)
        work = ShardRows(wire, checkpoint, found, coder, payload, group)
        rows = work.rows()

        def described() -> Target | None:
            return None if wire.rank else describe_files(checkpoint, in_base, payload)

        def in_base(path: str) -> tuple[int, bytes]:
            return digest_file(checkpoint.side_files[path])

        files = wire.together(described)
        if files is None:
            payload.close()
            return None
        return Delta(Base(base_id, 0), files, tuple(rows), checked, payload)


def _found(
    base: Checkpoint, model: torch.nn.Module | Mapping[Any, torch.Tensor], *, strict: bool
) -> dict[int, torch.Tensor]:
    """Return the model's tensors by the number of the base tensor that each replaces."""
    state = model.state_dict() if isinstance(model, torch.nn.Module) else model
    keys: dict[Any, list[int]] = defaultdict(list)
    tensors = [*base.tensors.values()]
    for number, there in enumerate(tensors):
        keys[there.key].append(number)
        keys[there.name].append(number)
    found = {}
    for key, tensor in state.items():
        numbers, name = keys[key], key if isinstance(key, str) else key[1]
        if len(numbers) != 1:
            how = "in several files; give pairs of file and name" if numbers else "not there"
            raise StructureMismatch(f"tensor {name!r} of the model is {how} in '{base.path}'")
        spec = tensors[numbers[0]].spec
        layout = wire_name(tensor.dtype), shape_in_file(tensor.dtype, tensor.shape)
        if layout != (spec.dtype.name, spec.shape):
            raise StructureMismatch(
                f"tensor {name!r} is {layout[0]} {list(layout[1])} in the model and {spec.dtype.name}"
                f" {list(spec.shape)} in '{base.path}'; give the base of this model",
                tensor=name,
            )
        found[numbers[0]] = tensor
    missing = [one.name for number, one in enumerate(tensors) if number not in found]
    if missing and strict:
        raise StructureMismatch(
            f"'{base.path}' has tensor {missing[0]!r}, which the model lacks; give all tensors, or keep those of the"
            " base (strict=False)",
            tensor=missing[0],
        )
    return found
