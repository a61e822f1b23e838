"""The target of a delta as a pipeline of diffusers.

The target is written to a temporary folder, since a pipeline is loaded from files. The folder is removed afterwards.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sparsedelta._typing import AnyPath, TorchDType
from sparsedelta.format.delta import Delta
from sparsedelta.format.paths import WEIGHT_SUFFIX
from sparsedelta.fs import temporary_folder
from sparsedelta.live.bits import check_installed, torch_dtype
from sparsedelta.live.parts import components_of, folder_of
from sparsedelta.ops.apply import apply
from sparsedelta.tensors.rebuild import Check

if TYPE_CHECKING:
    import torch


def load_pipeline(
    delta: Delta,
    base: AnyPath,
    *,
    pipeline_class: Any,
    dtype: TorchDType,
    device_map: Any,
    verify: Check,
    options: Mapping[str, Any] | None,
) -> Any:
    """Return the pipeline of a delta's target; see ``sparsedelta.load_model``."""
    check_installed("torch", "diffusers")
    import diffusers

    given = dict(options or {})
    loader: Any = pipeline_class or diffusers.DiffusionPipeline
    if "variant" not in given:
        given["variant"] = _only_variant(delta)
    if device_map is not None:
        given["device_map"] = device_map
    is_new = tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 40)
    dtype_name = "dtype" if is_new else "torch_dtype"
    dtypes = _dtypes(delta, given["variant"]) if dtype == "auto" else dtype
    with temporary_folder("pipeline") as folder:
        apply(base, delta, folder / "target", verify=verify)
        pipeline = loader.from_pretrained(
            folder / "target", **{dtype_name: dtypes, "local_files_only": True, **given}
        )
    _warn_of_rest(delta, pipeline)
    return pipeline


def _only_variant(delta: Delta) -> str | None:
    """Return the variant of a pipeline that has weights of one variant only, such as ``fp16``; else None."""
    found = {_variant(row.file) for row in delta.tensors if folder_of(row.file)}
    return found.pop() if len(found) == 1 else None


def _variant(file: str) -> str | None:
    """Return the variant that a weight file's name contains; None if it contains none."""
    name = file.rpartition("/")[2].removesuffix(WEIGHT_SUFFIX)
    _, dot, variant = name.partition(".")
    return variant.partition("-")[0] if dot else None


def _dtypes(delta: Delta, variant: str | None) -> dict[str, torch.dtype]:
    """Return the dtype in which each model of a pipeline is saved: that of most of its bytes."""
    import torch

    counts: dict[str, dict[str | None, Counter[torch.dtype]]] = defaultdict(
        lambda: defaultdict(Counter)
    )
    for row in delta.tensors:
        dtype = torch_dtype(row.target.dtype)
        if folder_of(row.file) and dtype is not None and dtype.is_floating_point:
            counts[folder_of(row.file)][_variant(row.file)][dtype] += row.target.n_bytes
    # A model that has no files of the variant is loaded without it.
    used = {folder: found.get(variant) or found.get(None) for folder, found in counts.items()}
    most = {folder: found.most_common(1)[0][0] for folder, found in used.items() if found}
    return {"default": torch.float32, **most}


def _warn_of_rest(delta: Delta, pipeline: Any) -> None:
    """Warn if the delta changes tensors of a part that the pipeline was loaded without."""
    parts = components_of(pipeline) or {}
    left = [row for row in delta.tensors if not row.is_copied and folder_of(row.file) not in parts]
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        warnings.warn(
            f"the delta changes tensors that the returned pipeline does not hold, {left[0].name!r} of"
            f" {left[0].file!r}{more}; to use them, apply the delta and load these tensors from the target",
            stacklevel=4,
        )
