"""The accelerators that torch sees."""

from __future__ import annotations


def accelerators() -> list[str] | None:
    """Return the name and memory of each GPU; None if torch is not installed or cannot be loaded."""
    try:
        import torch
    except (ImportError, OSError):
        return None
    found = []
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(number)
            found.append(f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        found.append("Apple GPU (mps)")
    return found
