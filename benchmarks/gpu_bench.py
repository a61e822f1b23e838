"""Records the results of the parts of ``gpu.py``, and measures time, memory and copies on the device."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_model import SHAPES, Shape
from torch.profiler import ProfilerActivity, profile

GIB, MB = 1 << 30, 1e6
FAILED = "failed"


@dataclass(frozen=True)
class Bench:
    """The settings of a part, and methods that record its results.

    Attributes:
        part: name of the part.
        results: file of JSON lines to which results are appended.
        work: folder for the part's files.
        device: device of torch.
        is_rehearsal: whether the part runs at toy size.
    """

    part: str
    results: Path
    work: Path
    device: str
    is_rehearsal: bool

    def shapes(self, *names: str) -> dict[str, Shape]:
        """Return the shapes with these names; toy shapes in a rehearsal."""
        return {name: SHAPES["toy" if self.is_rehearsal else name] for name in names}

    def size(self, real: int, toy: int) -> int:
        """Return the full size, or the toy size in a rehearsal."""
        return toy if self.is_rehearsal else real

    def record(self, what: str, value: float | str, unit: str = "", note: str = "") -> None:
        """Append a result to the file and print it."""
        row = {"part": self.part, "what": what, "value": value, "unit": unit, "note": note}
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        shown = f"{value:,.4g}" if isinstance(value, float) else value
        print(f"  {what}: {shown} {unit} {note}".rstrip(), flush=True)

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Record an exception of the block as a result, and free memory afterwards."""
        try:
            yield
        except Exception as error:  # any error: the next measurement may still work
            self.record(what, FAILED, note=f"{type(error).__name__}: {error}".split("\n")[0][:300])
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def seconds(self, work: Callable[[], Any]) -> float:
        """Return the seconds a function takes, including the work it leaves on the device."""
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start

    def begin_peak(self) -> None:
        """Reset the peak of the device's memory."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def bus_bytes(self, work: Callable[[], Any]) -> tuple[float, float] | None:
        """Do work, and return the MB copied to the device and to the host; None without a GPU.

        The copies are those that CUDA's profiling interface reports, of all threads.
        """
        if self.device != "cuda":
            work()
            return None
        place = self.work / "trace.json"
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            work()
            self.wait()
        seen.export_chrome_trace(str(place))
        copied = {"HtoD": 0, "DtoH": 0}
        for event in json.loads(place.read_text("utf-8"))["traceEvents"]:
            for direction in copied:
                if event.get("cat") == "gpu_memcpy" and direction in event["name"]:
                    copied[direction] += event["args"]["bytes"]
        place.unlink()
        return copied["HtoD"] / MB, copied["DtoH"] / MB

    def peak(self) -> int:
        """Return the peak of the GPU's memory since the reset, in bytes; 0 without a GPU."""
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else 0

    def wait(self) -> None:
        """Wait until the device has done its work."""
        if self.device == "cuda":
            torch.cuda.synchronize()
