"""Applies a delta to a small model of every architecture that transformers can build, and writes a page of results.

    python benchmarks/every_architecture.py [--only mixtral vit] [--result docs/architectures.md]

The exit status is 1 if a model ends in another state than the model loaded from the target, or if a delta is refused.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from measuring import ROOT, table

os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
sys.path.insert(0, str(ROOT / "tests" / "live"))

import torch
import transformers
from architectures import make_small  # type: ignore[import-not-found]
from safetensors.torch import load_file, save_file
from transformers.models.auto import modeling_auto

import sparsedelta

FILE = "model.safetensors"
SECONDS = 60
TASKS = {
    "text": "CAUSAL_LM",
    "masked text": "MASKED_LM",
    "text to text": "SEQ_TO_SEQ_CAUSAL_LM",
    "image and text": "IMAGE_TEXT_TO_TEXT",
    "image": "IMAGE_CLASSIFICATION",
    "speech": "SPEECH_SEQ_2_SEQ",
}
SAME, RENAMED, CONVERTED = "the module's own", "renamed", "converted"
EXACT, REFUSED, WRONG, SKIPPED = "exact", "refused", "wrong", "not built"
TEXT = """# Architectures

For each architecture of transformers {version} that can be built small with random weights, a delta between two of its
checkpoints was applied to the model loaded from the base. *Exact*: all bits were those of the model loaded from the
target, and `revert_` restored those of the base. `python benchmarks/every_architecture.py` writes this page.

{counts}

*Renamed*: tensors have other names in the checkpoint than in the module. *Converted*: tensors are also split, fused,
transposed or permuted when transformers loads them.

{results}

Not built, since transformers cannot build, save or load a small model with the sizes of the script: {skipped}.
"""


class TooLong(Exception):
    """Raised when a model takes too much time."""


def classes() -> Iterator[tuple[str, str, str]]:
    """Yield task, architecture and class name of all models to try, each class once."""
    seen: set[str] = set()
    for task, name in TASKS.items():
        for model_type, found in getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES").items():
            cls = found if isinstance(found, str) else found[0]
            if cls not in seen:
                seen.add(cls)
                yield task, model_type, cls


def change_file(path: Path) -> None:
    """Change one in fifty elements of every float tensor of a file, and at least one."""
    generator = torch.Generator().manual_seed(0)
    state = load_file(path)
    for tensor in state.values():
        if tensor.is_floating_point() and tensor.numel():
            n_changed = 1 + tensor.numel() // 50
            index = torch.randint(0, tensor.numel(), (n_changed,), generator=generator)
            tensor.view(-1)[index] += 0.25
    save_file(state, path, {"format": "pt"})


def kind_of(file: Path, state: Mapping[str, torch.Tensor]) -> str:
    """Return how the tensors of a file differ from those of the model that was loaded from it."""
    saved, own = (
        {name: contents(tensor) for name, tensor in tensors.items()}
        for tensors in (load_file(file), state)
    )
    if saved.items() <= own.items():
        return SAME
    return CONVERTED if Counter(saved.values()) - Counter(own.values()) else RENAMED


def contents(tensor: torch.Tensor) -> tuple[object, ...]:
    """Return what tells the contents of a tensor from those of others."""
    return (
        tuple(tensor.shape),
        tensor.dtype,
        tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes(),
    )


def same(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    """Return whether two states are equal, NaNs included."""
    return all(torch.equal(left[n].nan_to_num(7), right[n].nan_to_num(7)) for n in left)


def check(cls: Any, base: Path, target: Path, delta_path: Path) -> tuple[str, str]:
    """Return the result for two checkpoints of a class, and how their tensors differ from the module's."""
    live, wanted = (cls.from_pretrained(folder) for folder in (base, target))
    before = {name: tensor.clone() for name, tensor in live.state_dict().items()}
    kind = kind_of(base / FILE, before)
    with sparsedelta.diff(base, target) as delta:
        delta.save(delta_path)
    try:
        with sparsedelta.load(delta_path) as delta:
            delta.apply_(live)
            is_right = same(live.state_dict(), wanted.state_dict())
            delta.revert_(live)
    except sparsedelta.SparseDeltaError as error:
        return f"{REFUSED}: {error}", kind
    return EXACT if is_right and same(live.state_dict(), before) else WRONG, kind


def result_of(name: str) -> tuple[str, str]:
    """Return the result for a class, and how the tensors of its checkpoints differ from the module's."""
    folder = Path(tempfile.mkdtemp(prefix="architectures-"))
    signal.alarm(SECONDS)
    try:
        model = make_small(name).float()
        if sum(p.numel() for p in model.parameters()) > 6e7:
            return SKIPPED, ""
        model.save_pretrained(folder / "base", max_shard_size="1TB")
        shutil.copytree(folder / "base", folder / "target")
        change_file(folder / "target" / FILE)
        return check(type(model), folder / "base", folder / "target", folder / "delta.sd")
    except Exception as error:  # of transformers: sizes that do not go together
        print(f"  {type(error).__name__}: {' '.join(str(error).split())[:150]}", file=sys.stderr)
        return SKIPPED, ""
    finally:
        signal.alarm(0)
        shutil.rmtree(folder)


def stop(*_: object) -> None:
    """Interrupt a model that takes too long."""
    raise TooLong(f"more than {SECONDS} seconds")


def main() -> int:
    """Try all architectures; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", default=(), help="architectures or classes")
    parser.add_argument("--result", type=Path, default=ROOT / "docs" / "architectures.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    signal.signal(signal.SIGALRM, stop)
    found = []
    for task, model_type, cls in classes():
        if not options.only or {model_type, cls} & set(options.only):
            result, kind = result_of(cls)
            print(f"{model_type:<24} {cls:<48} {result} {kind}", flush=True)
            found.append((task, model_type, cls, result, kind))
    tried = [one for one in found if one[3] != SKIPPED]
    rows = Counter((kind, result.split(":")[0]) for *_, result, kind in tried)
    counts = [
        [kind, *(str(rows[kind, result]) for result in (EXACT, REFUSED, WRONG))]
        for kind in (SAME, RENAMED, CONVERTED)
    ]
    text = TEXT.format(
        version=version("transformers"),
        counts=table(["names and shapes in the checkpoint", EXACT, REFUSED, WRONG], counts),
        results=table(
            ["architecture", "class", "task", "checkpoint", "result"],
            [[f"`{a}`", f"`{c}`", task, kind, result] for task, a, c, result, kind in tried],
        ),
        skipped=", ".join(f"`{cls}`" for _, _, cls, result, _ in found if result == SKIPPED),
    )
    options.result.write_text(text, "utf-8")
    print(f"\n{table(['checkpoint', EXACT, REFUSED, WRONG], counts)}\nwritten to {options.result}")
    return int(any(result != EXACT for *_, result, _ in tried))


if __name__ == "__main__":
    sys.exit(main())
