"""Measures diff, apply and verify on executors beside the threads of one process, and compares their outputs.

    python benchmarks/executors.py [--gb 1] [--rounds 3]

All executors are started before the measurement, and take turns. Dask and Ray are measured if they are installed.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from measuring import (
    Run,
    median,
    options_for,
    ratio_and_range,
    remove,
    table,
    tree_bytes,
    warm,
    work_folder,
    write_result,
)
from synthetic import make_pair

import sparsedelta

# Workers import this file, too. ``distributed.py`` beside it must not hide Dask's package of that name.
HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() != HERE]
N = os.cpu_count() or 1
VERBS = ("diff", "apply", "verify")


class RayExecutor:
    """Ray with the interface of concurrent.futures, as docs/distributed.md shows it."""

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Any:
        """Start a call."""
        import ray

        return RayFuture(ray.remote(fn).remote(*args))


class RayFuture:
    """The result of a call on Ray."""

    def __init__(self, reference: Any) -> None:
        self.reference = reference

    def result(self) -> Any:
        """Wait for the result."""
        import ray

        return ray.get(self.reference)


@contextmanager
def dask() -> Iterator[Any]:
    """Yield the executor of a local cluster of Dask."""
    distributed = import_module("distributed")
    with (
        distributed.LocalCluster(
            n_workers=N, threads_per_worker=1, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client.get_executor()


@contextmanager
def ray_executor() -> Iterator[Any]:
    """Yield an executor of Ray on this machine."""
    import ray

    ray.init(num_cpus=N, include_dashboard=False, log_to_driver=False)
    try:
        yield RayExecutor()
    finally:
        ray.shutdown()


@contextmanager
def nothing() -> Iterator[None]:
    """Yield no executor."""
    yield None


def executors() -> dict[str, Callable[[], Any]]:
    """Return what to measure by name."""
    spawn = multiprocessing.get_context("spawn")
    found: dict[str, Callable[[], Any]] = {
        "threads of one process": nothing,
        "`ThreadPoolExecutor`": lambda: ThreadPoolExecutor(N),
        "`ProcessPoolExecutor`": lambda: ProcessPoolExecutor(N, mp_context=spawn),
    }
    if find_spec("distributed"):
        found["Dask, `LocalCluster`"] = dask
    if find_spec("ray"):
        found["Ray"] = ray_executor
    return found


def call(verb: str, folder: Path, executor: Any) -> Run:
    """Run one verb; return its time. Its output is ``delta.sd`` or ``out``."""
    base, target, delta, out = (folder / n for n in ("base", "target", "delta.sd", "out"))
    if verb != "verify":
        remove(delta if verb == "diff" else out)
    os.sync()
    start = time.perf_counter()
    if verb == "diff":
        with sparsedelta.diff(base, target, executor=executor) as made:
            made.save(delta)
    elif verb == "apply":
        sparsedelta.apply(base, delta, out, executor=executor)
    else:
        sparsedelta.verify(delta, base=base, target=target, executor=executor)
    return Run(time.perf_counter() - start, 0)


def main() -> int:
    """Run the benchmark."""
    parser = options_for(__doc__, "executors.md")
    parser.add_argument("--gb", type=float, default=1.0, help="size of the base")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    runs: dict[str, dict[str, list[Run]]] = {}
    expected = b""
    with work_folder(options.work_dir, keep=options.keep) as folder:
        base, target = make_pair(folder, round(options.gb * 1e9))
        warm(base, target)
        with ExitStack() as stack:
            started = {name: stack.enter_context(start()) for name, start in executors().items()}
            for number in range(options.rounds + 1):
                for verb in VERBS:
                    for name, executor in started.items():
                        taken = call(verb, folder, executor)
                        if number:  # the first round starts the workers
                            runs.setdefault(name, {}).setdefault(verb, []).append(taken)
                        if verb == "diff":
                            expected = expected or (folder / "delta.sd").read_bytes()
                            if (folder / "delta.sd").read_bytes() != expected:
                                raise RuntimeError(f"{name}: the delta has other bytes")
                print(f"  round {number}/{options.rounds}", flush=True)
        size = tree_bytes(base)
        reference = runs["threads of one process"]
        rows = [
            [name]
            + [f"{median(r.seconds for r in measured[verb]):.2f}" for verb in VERBS]
            + [ratio_and_range(measured[verb], reference[verb]) for verb in VERBS]
            for name, measured in runs.items()
        ]
        columns = ["workers", *(f"`{v}`, s" for v in VERBS), *(f"`{v}`, ratio" for v in VERBS)]
        text = (
            f"{size / 1e9:.2f} GB, 1 % of the elements changed, {N} workers each. All deltas have the same bytes; every"
            " output was compared with its digests. Ratios are to the threads of one process: median, lowest, highest."
        )
        write_result(
            options.result,
            "diff, apply and verify on executors",
            [text, table(columns, rows)],
            where=folder,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
