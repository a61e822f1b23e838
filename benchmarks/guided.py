"""Mutants of deltas guided by the branches of the package that they reach; run by ``mutations.py --guided``.

atheris, which is libFuzzer for Python, chooses which mutants to mutate again. What they do is checked and counted as
without guidance, and ends nothing. The arguments are those of ``mutations.guided``.
"""

from __future__ import annotations

import importlib
import itertools
import os
import pkgutil
import random
import resource
import sys
from pathlib import Path

import atheris
import torch

NOT_NEEDED = ("sparsedelta.cli", "sparsedelta.hub", "sparsedelta.channel", "sparsedelta.__main__")

with atheris.instrument_imports(include=["sparsedelta"]):
    import sparsedelta

    for module in pkgutil.walk_packages(sparsedelta.__path__, "sparsedelta."):
        if not module.name.startswith(NOT_NEEDED):
            importlib.import_module(module.name)

import mutations  # noqa: E402 - imports the package, which has to be instrumented first

MAX_BYTES = 1 << 16


def main() -> None:
    """Fuzz until the time is over; outcomes go to the descriptor, one a line."""
    inputs, work, kept = map(Path, sys.argv[1:4])
    report, seconds, seed = int(sys.argv[4]), float(sys.argv[5]), int(sys.argv[6])
    torch.set_num_threads(1)
    calls = mutations.Calls(inputs, work, "one")
    corpus, found = work / "corpus", work / "found"
    for folder in (corpus, found):
        folder.mkdir()
    originals = [(inputs / f"{name}.sd").read_bytes() for name in ("one", "set")]
    for name, original in enumerate(originals):
        (corpus / str(name)).write_bytes(original)
    numbers = itertools.count()
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def run(data: bytes) -> None:
        nonlocal start
        calls.mutant.write_bytes(data)
        mutations.run_all(calls, kept / f"guided-{seed}-{next(numbers)}", report)
        now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if now - start > mutations.MEMORY_KB:
            start = now
            os.write(report, b"load,over 1 GB\n")

    def mutate(data: bytes, max_size: int, number: int) -> bytes:
        random.seed(number)
        try:
            # Mutants of mutants are seldom deltas: half of all are made from whole ones.
            changed = mutations.mutant(random.choice((data, data, *originals)))
        except Exception:  # no longer a delta: its parts cannot be found
            changed = atheris.Mutate(data, max_size)
        return bytes(changed)[:max_size]

    options = [
        f"-max_total_time={max(1, round(seconds))}", f"-seed={seed + 1}", f"-max_len={MAX_BYTES}",
        "-len_control=0", "-rss_limit_mb=0", "-timeout=3600", f"-artifact_prefix={found}/", str(corpus),
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *options], run, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
