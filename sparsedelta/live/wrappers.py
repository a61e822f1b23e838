"""Names of a module's tensors without the parts that wrappers insert."""

from __future__ import annotations

# Parts of names that wrappers insert: torch.compile, FSDP, activation checkpointing, and PEFT for an adapted
# layer and for a module of which it trains a copy.
_WRAPPERS = {
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "base_layer",
    "original_module",
}
_OUTER = (("base_model", "model"), ("module",))  # prefixes of PEFT and of data parallelism


def plain_name(name: str) -> str:
    """Return a name without the parts that wrappers insert."""
    parts = tuple(part for part in name.split(".") if part not in _WRAPPERS)
    for outer in _OUTER:
        if parts[: len(outer)] == outer:
            parts = parts[len(outer) :]
    return ".".join(parts)
