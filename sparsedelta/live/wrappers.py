"""What wrappers add to the names of a module's tensors."""

from __future__ import annotations

# torch.compile, FSDP, activation checkpointing, and PEFT around a layer it adapts.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"}
_OUTER = (("base_model", "model"), ("module",))  # PEFT's model, and data parallelism


def plain_name(name: str) -> str:
    """Return a name without what wrappers add to it."""
    parts = tuple(part for part in name.split(".") if part not in _WRAPPERS)
    for outer in _OUTER:
        if parts[: len(outer)] == outer:
            parts = parts[len(outer) :]
    return ".".join(parts)
