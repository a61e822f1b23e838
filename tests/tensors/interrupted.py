"""Send SIGINT at random moments of ``run_all``. Fails if a worker is still running after it."""

from __future__ import annotations

import random
import signal
import sys
import threading
from typing import Any

from sparsedelta.tensors.parallel import Pace, run_all

N_TRIES = 2000


def interrupt(*_: Any) -> None:
    signal.raise_signal(signal.SIGINT)


def main() -> None:
    random.seed(0)
    signal.signal(signal.SIGALRM, interrupt)
    n_interrupted = 0
    for _ in range(N_TRIES):
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 1e-3))
            run_all(lambda i: i, range(50), cost=lambda _: 1 << 20, pace=Pace())
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            n_interrupted += 1
        if threading.active_count() > 1:
            sys.exit("a worker is left")
    if not n_interrupted:
        sys.exit("nothing was interrupted")


if __name__ == "__main__":
    main()
