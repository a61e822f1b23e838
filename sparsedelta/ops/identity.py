"""Which checkpoint it is: the fingerprint of what is on disk or in memory."""

from __future__ import annotations

from sparsedelta.files.checkpoint import Checkpoint
from sparsedelta.format.digests import fingerprint
from sparsedelta.progress import Progress
from sparsedelta.tensors.compare import digest_tensor
from sparsedelta.tensors.parallel import Pace, run_all


def checkpoint_fingerprint(checkpoint: Checkpoint, *, progress: Progress | None = None) -> bytes:
    """Return the fingerprint of an open checkpoint's tensors (FORMAT §14)."""
    pace = Pace(progress)
    tensors = [*checkpoint.tensors.values()]
    digests = run_all(
        lambda tensor: digest_tensor(tensor, pace),
        tensors,
        cost=lambda tensor: tensor.spec.n_bytes,
        pace=pace,
        label="reading",
    )
    return fingerprint(
        (tensor.name, tensor.spec.with_digest(digest))
        for tensor, digest in zip(tensors, digests, strict=True)
    )
