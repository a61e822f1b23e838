"""Times deltas on a model in memory beside reloading it, PEFT adapters and ``index_copy_``.

    python benchmarks/live.py [--gb 2.2] [--rounds 5] [--device cpu]

The floor of a switch is ``index_copy_`` of decoded tensors: it restores the base's values and writes the
other delta's. The rows of PEFT are left out if ``peft`` is not installed.
"""

from __future__ import annotations

import gc
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from measuring import (
    CLI,
    options_for,
    run,
    table,
    tree_bytes,
    warm,
    work_folder,
    write_result,
)
from safetensors import safe_open
from variants import make_base, make_variant

import sparsedelta
from sparsedelta.live.bits import flat_bits
from sparsedelta.live.held import in_order
from sparsedelta.live.inplace import prepare
from sparsedelta.live.patch import Patch

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RELOAD = "load the checkpoint again"
FLOORS = {"floor: index_copy_ out and in": True, "floor: scatter_ out and in": False}
LOAD = """
import sys, torch
sys.path.insert(0, {root!r})
{call}
"""


class Clock:
    """The times of actions by name, one per round."""

    def __init__(self, device: str) -> None:
        self.seconds: dict[str, list[float]] = {}
        self._cuda = device != "cpu"

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Time the block."""
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds.setdefault(name, []).append(time.perf_counter() - start)
        print(f"  {name:<44} {self.seconds[name][-1]:8.3f} s", flush=True)

    def rows(self, references: Mapping[str, str]) -> list[list[str]]:
        """Return a row for each action: median, range, and ratio to the reference's median."""
        result = []
        for name, times in self.seconds.items():
            reference = references.get(name)
            ratio = ""
            if reference in self.seconds:
                share = statistics.median(times) / statistics.median(self.seconds[reference])
                ratio = f"{share:.3g} × {reference}"
            span = f"{statistics.median(times):.3f} ({min(times):.3f}–{max(times):.3f})"
            result.append([name, span, ratio])
        return result

    def _wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()


def load_whole(folder: Path, device: str) -> Any:
    """Return the model in a folder, in bf16, copied to private memory.

    On a CPU transformers maps the files and reads a weight only when it is used.
    """
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    if device != "cpu":
        return model.to(device)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def copy_checkpoint(folder: Path, model: Any) -> None:
    """Copy the weights of a checkpoint into an existing model."""
    own = dict(model.named_parameters())
    with torch.no_grad():
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    own[name].copy_(file.get_tensor(name))


def copy_in(patches: list[Patch], *, undo: bool, plain: bool) -> None:
    """Set touched elements with ``index_copy_``, or with ``scatter_``."""
    for patch in patches:
        values = patch.before if undo else patch.after
        tensor = flat_bits(in_order(patch.place.slot.tensor()))  # contiguous, so not a copy
        if plain:
            tensor.index_copy_(0, patch.index, values)
        else:
            tensor.scatter_(0, patch.index, values)


def measure_deltas(
    clock: Clock, base: Path, variants: list[Path], deltas: list[Path], device: str, n_rounds: int
) -> Any:
    """Time loading, applying and switching; return the model, which is the base."""
    for _ in range(n_rounds):
        with clock.timed(RELOAD):
            load_whole(variants[0], device)
        gc.collect()
    model = load_whole(base, device)
    for _ in range(n_rounds):
        with clock.timed("copy the checkpoint into the model"):
            copy_checkpoint(variants[0], model)
    copy_checkpoint(base, model)
    for _ in range(n_rounds):
        with clock.timed("apply a delta from disk"), sparsedelta.load(deltas[0]) as delta:
            delta.apply_(model)
        with clock.timed("revert it, from disk"), sparsedelta.load(deltas[0]) as delta:
            delta.revert_(model)
        with clock.timed("apply from disk, verify none"), sparsedelta.load(deltas[0]) as delta:
            delta.apply_(model, verify="none")
        with sparsedelta.load(deltas[0]) as delta:
            delta.revert_(model, verify="full")
    bank = sparsedelta.DeltaBank(model)
    for number, path in enumerate(deltas):
        with clock.timed("add a delta to a bank"):
            bank.add(str(number), path)
    decoded = []
    for path in deltas:
        with sparsedelta.load(path) as delta:
            decoded.append(prepare(delta, model, verify="none", names=None, undo=False))
    bank.activate("0")
    for _ in range(n_rounds):
        with clock.timed("switch resident deltas"):
            bank.activate("1")
        bank.activate("0")
        for name, plain in FLOORS.items():
            with clock.timed(name):
                copy_in(decoded[0], undo=True, plain=plain)
                copy_in(decoded[1], undo=False, plain=plain)
            copy_in(decoded[1], undo=True, plain=plain)
            copy_in(decoded[0], undo=False, plain=plain)
    bank.activate(None)
    print(f"  resident: {bank.resident_bytes / 1e6:.0f} MB for {len(bank)} deltas")
    return model


def measure_peft(clock: Clock, model: Any, folder: Path, n_bytes: int, n_rounds: int) -> list[str]:
    """Time adapters of about the size of a delta; return their descriptions."""
    import peft

    sizes = [m.weight.shape for n, m in model.named_modules() if n.rpartition(".")[2] in LINEAR]
    rank = max(1, round(n_bytes / 2 / sum(sum(shape) for shape in sizes)))
    notes = [f"peft {peft.__version__}, rank {rank} on all linear layers, as large as the delta"]
    kinds: dict[str, Callable[[], Any]] = {
        "LoRA": lambda: peft.LoraConfig(r=rank, target_modules=LINEAR, init_lora_weights=False),
        "SHiRA": lambda: peft.ShiraConfig(r=rank, target_modules=LINEAR, init_weights=False),
    }
    for kind, config in kinds.items():
        wrapped: Any = peft.get_peft_model(model, config(), adapter_name="a")
        wrapped.to(torch.bfloat16)
        wrapped.add_adapter("b", config())
        wrapped.to(torch.bfloat16)
        wrapped.save_pretrained(folder / kind, selected_adapters=["a", "b"])
        more = ": as many values as LoRA, and their positions" if kind == "SHiRA" else ""
        notes.append(f"{kind}: {tree_bytes(folder / kind / 'a') / 1e6:.1f} MB per file{more}")
        for _ in range(n_rounds):
            with clock.timed(f"{kind}: load_adapter, set_adapter, merge"):
                wrapped.load_adapter(folder / kind / "a", adapter_name="c")
                wrapped.set_adapter("c")
                wrapped.merge_adapter()
            with clock.timed(f"{kind}: unmerge, set_adapter, merge"):
                wrapped.unmerge_adapter()
                wrapped.set_adapter("b")
                wrapped.merge_adapter()
            wrapped.unmerge_adapter()
            wrapped.delete_adapter("c")
        model = wrapped.unload()
    return notes


def peak_of(call: str) -> int:
    """Return the peak anonymous memory of a process that runs a call."""
    root = str(Path(__file__).resolve().parent.parent)
    command = [sys.executable, "-c", LOAD.format(root=root, call=call)]
    return run(command, sample_memory=True).peak_anonymous_bytes or 0


def measure_memory(base: Path, variant: Path, delta: Path) -> str:
    """Return a table of the peak anonymous memory of loading a model in two ways."""
    whole = f"import transformers as t; t.AutoModelForCausalLM.from_pretrained({str(variant)!r})"
    made = f"import sparsedelta; sparsedelta.load_model({str(delta)!r}, base={str(base)!r})"
    rows = [
        ["imports alone", f"{peak_of('import transformers as t; t.LlamaForCausalLM') / 1e9:.2f}"],
        ["`from_pretrained(target)`", f"{peak_of(whole) / 1e9:.2f}"],
        ["`load_model(delta, base=…)`", f"{peak_of(made) / 1e9:.2f}"],
    ]
    return table(["", "peak anonymous memory, GB"], rows)


def main() -> int:
    """Run the benchmark."""
    parser = options_for(__doc__, "live.md")
    parser.add_argument("--gb", type=float, default=2.2, help="size of the model in bf16, in GB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peft-rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    logging: Any = transformers.utils.logging
    logging.disable_progress_bar()
    clock = Clock(options.device)
    with work_folder(options.work_dir, keep=options.keep) as work:
        base = make_base(work, round(options.gb * 1e9))
        variants = [make_variant(base, work / f"target-{n}", n) for n in range(2)]
        deltas = [work / f"{n}.sd" for n in range(2)]
        for variant, delta in zip(variants, deltas, strict=True):
            run([*CLI, "diff", base, variant, "-o", delta])
        shutil.rmtree(variants[1])
        warm(base, variants[0])
        with sparsedelta.load(deltas[0]) as found:
            nnz, numel = found.nnz, found.numel
        n_bytes = deltas[0].stat().st_size
        model = measure_deltas(clock, base, variants, deltas, options.device, options.rounds)
        notes = [
            f"{numel / 1e9:.2f} billion bf16 parameters on {options.device}, {nnz / numel:.2%} changed;"
            f" deltas of {n_bytes / 1e6:.1f} MB; files in the page cache; {options.rounds} rounds,"
            f" {options.peft_rounds} of PEFT's adapters."
        ]
        if find_spec("peft"):
            notes += measure_peft(clock, model, work, n_bytes, options.peft_rounds)
        else:
            notes.append("peft is not installed: no adapters were measured.")
        del model
        gc.collect()
        references = {name: "" if name == RELOAD else RELOAD for name in clock.seconds}
        references |= {"switch resident deltas": next(iter(FLOORS))}
        rows = clock.rows(references)
        memory = measure_memory(base, variants[0], deltas[0])
        sections = [
            "\n".join(f"- {note}" for note in notes),
            table(["", "seconds", "ratio"], rows),
            "## Memory of loading",
            "On a CPU `from_pretrained` maps the files: the weights are in the page cache, which is not counted.",
            memory,
        ]
        write_result(options.result, "Deltas on a model in memory", sections, where=work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
