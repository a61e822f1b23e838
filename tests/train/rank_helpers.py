"""Processes that torch.distributed connects through gloo, for tests; they are started once."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import get_context

_SECONDS = 300  # for one call, on a busy machine


class RankPool:
    """Runs functions in several processes at the same time; each process is one rank."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._start()

    def _start(self) -> None:
        context = get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(self._n):
            here, there = context.Pipe()
            given = (rank, self._n, f"{self._folder.name}/store", there)
            process = context.Process(target=_serve, args=given, daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        """Return what each rank's call ``work(rank, *args)`` returned, or the exception it raised."""
        for pipe in self._pipes:
            pipe.send((work, args))
        results = []
        for pipe in self._pipes:
            if not pipe.poll(_SECONDS):
                self.close(0)
                self._start()  # answers that come later are not those of the next call
                raise TimeoutError("a rank did not answer")
            results.append(pipe.recv())
        return results

    def results(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        """Return what each rank's call returned; raise what one of them raised."""
        results = self.run(work, *args)
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    def close(self, seconds: float = 10) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(seconds)
            process.kill()
        self._folder.cleanup()


def _serve(rank: int, n: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    # As torchrun sets them; accelerate reads them.
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n}
    os.environ.update({name: str(number) for name, number in numbers.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"})
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=n)
    while True:
        try:
            work, args = pipe.recv()
        except EOFError:
            break
        try:
            result = work(rank, *args)
        except Exception as error:
            result = type(error)(*error.args)  # without its traceback and causes
        dist.barrier()
        pipe.send(result)
    dist.destroy_process_group()


def wait_for(path: Path, seconds: float = _SECONDS) -> None:
    """Wait until another process has created a file."""
    import time

    end = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > end:
            raise TimeoutError(f"'{path}' was not created")
        time.sleep(0.02)


def free_port() -> int:
    """Return a port of this machine that nothing listens on."""
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
