"""Mutants of deltas guided by the branches of the package that they reach; run by ``mutations.py --guided``.

atheris, which is libFuzzer for Python, chooses which mutants to mutate again. What they do is checked and counted as
without guidance, and ends nothing. The arguments are those of ``mutations.guided``.
"""

from __future__ import annotations

import importlib
import itertools
import pkgutil
import random
import sys
from contextlib import suppress
from pathlib import Path

import atheris
import torch

NOT_NEEDED = ("sparsedelta.cli", "sparsedelta.hub", "sparsedelta.channel", "sparsedelta.__main__")

INSTRUMENTED = ["sparsedelta." + room for room in ("format", "codecs", "tensors", "ops")]
with atheris.instrument_imports(include=INSTRUMENTED):
    import sparsedelta

    for module in pkgutil.walk_packages(sparsedelta.__path__, "sparsedelta."):
        if not module.name.startswith(NOT_NEEDED):
            # A module for a package that is not installed, such as triton, is not fuzzed.
            with suppress(ModuleNotFoundError):
                importlib.import_module(module.name)

# They import the package, which has to be instrumented first.
import mutants  # noqa: E402
import mutations  # noqa: E402
from mutant_inputs import FAMILIES  # noqa: E402

MAX_BYTES = 1 << 15
MUTANTS = 100_000  # of one process, because the memory of libFuzzer grows by 8 kB with each


def main() -> None:
    """Fuzz until the time is over; outcomes go to the descriptor, one a line."""
    inputs, work, kept = map(Path, sys.argv[1:4])
    report, seconds, seed = int(sys.argv[4]), float(sys.argv[5]), int(sys.argv[6])
    torch.set_num_threads(1)
    families = [mutations.Calls(inputs / name, work / name) for name in FAMILIES]
    # One family has many tensors, so that its mutants take longer.
    originals = [
        seed for calls in (*families, *families[::2], *families[::2]) for seed in calls.seeds
    ]
    corpus = work / "corpus"
    corpus.mkdir()
    for name, original in enumerate(originals):
        (corpus / str(name)).write_bytes(original)
    numbers = itertools.count()
    mutations.limit_memory()

    def run(data: bytes) -> None:
        mutations.run_all(families, data, kept / f"guided-{seed}-{next(numbers)}", report)

    def mutate(data: bytes, max_size: int, number: int) -> bytes:
        random.seed(number)
        try:
            # Mutants of mutants are seldom deltas: half of all are made from whole ones.
            changed = mutants.mutant(random.choice((data, data, *random.sample(originals, 2))))
        except Exception:  # no longer a delta: its parts cannot be found
            changed = atheris.Mutate(data, max_size)
        return bytes(changed)[:max_size]

    options = [
        f"-max_total_time={max(1, round(seconds))}", f"-seed={seed + 1}", f"-max_len={MAX_BYTES}",
        "-len_control=0", f"-runs={MUTANTS}", "-rss_limit_mb=0", "-timeout=3600", f"-artifact_prefix={kept}/guided-{seed}-died-",
        str(corpus),
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *options], run, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
