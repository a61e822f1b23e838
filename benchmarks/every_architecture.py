"""Applies deltas to a small model of every architecture of transformers, and trains one; writes a page of results.

    python benchmarks/every_architecture.py [--only mixtral vit] [--result docs/architectures.md]

The exit status is 1 if a model ends in another state than it should, if a delta is refused, and if training reaches
less than half of the weights of a model.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
from sift_train import SIFT, export_delta

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
EXACT, REFUSED, WRONG = "exact", "refused", "wrong"
MAX_ELEMENTS = 110_000_000
SHARE_OF_STEP = 0.05  # of the components that SIFT trains
TEXT = """# Architectures

Small models with random weights, of each class that transformers {version} names for {tasks}.
`python benchmarks/every_architecture.py` writes this page.

- *In memory*: a delta between two checkpoints was applied to the model loaded from the base. *Exact*: all bits were those
  of the model loaded from the target, and `revert_` restored those of the base.
- *Trained*: SIFT trained the model for two steps, and its delta was applied to the base's folder. *Exact*: all bits of the
  model loaded from the result were those of the trained model.
- *Reach*: the share of the matrices, without tables of embeddings and convolutions, of which `sparse_module="all-linear"`
  trains components.

{counts}

*Renamed*: tensors have other names in the checkpoint than in the module. *Converted*: tensors are also split, fused,
transposed or permuted when transformers loads them.

{results}

## Not tried

transformers does not build, save and load such a small model: {unbuilt}.

transformers loads other weights than it has saved: {unread}.
"""


@dataclass(frozen=True)
class Result:
    """What was found for a class of models.

    Attributes:
        in_memory: ``EXACT``, ``WRONG``, or ``REFUSED`` with the error.
        trained: the same, of training.
        reach: share of the matrices with trained components.
        kind: how the tensors of the checkpoint differ from the module's.
    """

    in_memory: str
    trained: str
    reach: float
    kind: str

    @property
    def is_right(self) -> bool:
        """Whether all is as the page promises."""
        return self.in_memory == self.trained == EXACT and self.reach >= 0.5


class NotTried(Exception):
    """Raised when transformers cannot do its part."""


class NotReadBack(Exception):
    """Raised when transformers loads other weights than it has saved."""


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


def outcome(is_right: Callable[[], bool]) -> str:
    """Return the result of a check."""
    try:
        return EXACT if is_right() else WRONG
    except sparsedelta.SparseDeltaError as error:
        return f"{REFUSED}: {error}"


def is_right_in_memory(cls: Any, base: Path, delta_path: Path) -> bool:
    """Return whether a delta and its inverse are right for a model in memory."""
    target = base.with_name("target")
    shutil.copytree(base, target)
    change_file(target / FILE)
    live, wanted = (cls.from_pretrained(folder) for folder in (base, target))
    before = {name: tensor.clone() for name, tensor in live.state_dict().items()}
    with sparsedelta.diff(base, target) as delta:
        delta.save(delta_path)
    with sparsedelta.load(delta_path) as delta:
        delta.apply_(live)
        is_right = same(live.state_dict(), wanted.state_dict())
        delta.revert_(live)
    return is_right and same(live.state_dict(), before)


def train(model: Any) -> tuple[SIFT, float]:
    """Train a model for two steps, without inputs; return its SIFT and the share of the weights that it reaches."""
    sift = SIFT(model, SHARE_OF_STEP)
    optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        products = (
            (p * torch.randn(p.shape, generator=generator)).sum()
            for p in sift.trainable_parameters()
        )
        sum(products, torch.zeros(())).backward()
        optimizer.step()
        optimizer.zero_grad()
    return sift, reached_share(model, sift)


def reached_share(model: torch.nn.Module, sift: SIFT) -> float:
    """Return the share of the matrices that are trained, without tables of embeddings and convolutions."""
    apart = {
        parameter
        for module in model.modules()
        if isinstance(module, torch.nn.modules.conv._ConvNd) or "Embedding" in type(module).__name__
        for parameter in module.parameters(recurse=False)
    }
    matrices = {p for p in model.parameters() if p.dim() > 1 and p not in apart}
    trained = matrices & set(sift.trainable_parameters())
    return sum(p.numel() for p in trained) / max(1, sum(p.numel() for p in matrices))


def is_right_trained(model: Any, sift: SIFT, base: Path, delta_path: Path) -> bool:
    """Return whether the delta of a training gives the trained model."""
    export_delta(model, delta_path, sift=sift, base=base)
    out = base.with_name("out")
    sparsedelta.apply(base, delta_path, out)
    return same(model.state_dict(), type(model).from_pretrained(out).state_dict())


def small_model(name: str, folder: Path) -> Any:
    """Return a small model of a class, loaded from a folder that it was saved in.

    Raises:
        NotTried: transformers cannot build, save or load it.
    """
    try:
        model = make_small(name).float()
        if sum(p.numel() for p in model.parameters()) > MAX_ELEMENTS:
            raise NotTried("too large")
        model.save_pretrained(folder, max_shard_size="1TB")
        return type(model).from_pretrained(folder)
    except TooLong:
        raise
    except Exception as error:  # sizes that do not go together
        raise NotTried(f"{type(error).__name__}: {' '.join(str(error).split())[:150]}") from error


def check_saving(model: Any, folder: Path) -> None:
    """Check that transformers loads what it saves.

    Raises:
        NotReadBack: it does not.
    """
    model.save_pretrained(folder, max_shard_size="1TB")
    try:
        again = type(model).from_pretrained(folder).state_dict()
    except ValueError as error:
        raise NotReadBack(str(error)) from error
    if not same(model.state_dict(), again):
        raise NotReadBack("other values")


def result_of(name: str) -> Result:
    """Return what is found for a class.

    Raises:
        NotTried: transformers cannot build, save or load a small model.
        NotReadBack: transformers loads other weights than it has saved.
        TooLong: it took more than ``SECONDS``.
    """
    folder = Path(tempfile.mkdtemp(prefix="architectures-"))
    base, delta_path = folder / "base", folder / "delta.sd"
    signal.alarm(SECONDS)
    try:
        model = small_model(name, base)
        kind = kind_of(base / FILE, model.state_dict())
        in_memory = outcome(partial(is_right_in_memory, type(model), base, delta_path))
        delta_path.unlink(missing_ok=True)
        sift, reach = train(model)
        check_saving(model, folder / "plain")
        trained = outcome(partial(is_right_trained, model, sift, base, delta_path))
        return Result(in_memory, trained, reach, kind)
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
    found: list[tuple[str, str, str, Result]] = []
    unbuilt, unread = [], []
    for task, model_type, cls in classes():
        if options.only and not {model_type, cls} & set(options.only):
            continue
        try:
            result = result_of(cls)
        except NotReadBack as error:
            print(f"{model_type:<24} {cls:<48} not read back: {error}", flush=True)
            unread.append(cls)
        except (NotTried, TooLong) as error:
            print(f"{model_type:<24} {cls:<48} not tried: {error}", flush=True)
            unbuilt.append(cls)
        else:
            print(f"{model_type:<24} {cls:<48} {result}", flush=True)
            found.append((task, model_type, cls, result))
    options.result.write_text(page(found, unbuilt, unread), "utf-8")
    wrong = [cls for _, _, cls, result in found if not result.is_right]
    print(f"\n{len(found)} tried, not right: {', '.join(wrong) or 'none'}; see {options.result}")
    return int(bool(wrong))


def page(
    found: Sequence[tuple[str, str, str, Result]], unbuilt: Sequence[str], unread: Sequence[str]
) -> str:
    """Return the page of results, in Markdown."""
    counts = []
    for kind in (SAME, RENAMED, CONVERTED):
        results = [result for *_, result in found if result.kind == kind]
        exact = (sum(getattr(r, way) == EXACT for r in results) for way in ("in_memory", "trained"))
        counts.append([kind, str(len(results)), *map(str, exact)])
    rows = [
        [f"`{a}`", f"`{c}`", task, r.kind, r.in_memory, r.trained, f"{r.reach:.0%}"]
        for task, a, c, r in found
    ]
    head = ["architecture", "class", "task", "checkpoint", "in memory", "trained", "reach"]
    return TEXT.format(
        version=version("transformers"),
        tasks=", ".join(TASKS),
        counts=table(
            ["names and shapes in the checkpoint", "models", "in memory exact", "trained exact"],
            counts,
        ),
        results=table(head, rows),
        unbuilt=", ".join(f"`{cls}`" for cls in unbuilt) or "none",
        unread=", ".join(f"`{cls}`" for cls in unread) or "none",
    )


if __name__ == "__main__":
    sys.exit(main())
