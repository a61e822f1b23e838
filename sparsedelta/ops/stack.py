"""``stack``: several deltas as one, exactly, and without their base as far as that can be.

Applying the stack is applying the deltas one after the other: tensors, files and all. It is made
tensor by tensor and chunk by chunk, whatever the number of deltas.
"""

from __future__ import annotations

from contextlib import ExitStack

from sparsedelta._typing import AnyPath
from sparsedelta.files.side_files import check_base_files
from sparsedelta.format.delta import AnyDelta, Delta, opened
from sparsedelta.format.spool import new_payload
from sparsedelta.ops.base_check import explained, find_base, open_base
from sparsedelta.ops.stacking.chains import Chain
from sparsedelta.ops.stacking.relation import relation
from sparsedelta.ops.stacking.siblings import Siblings
from sparsedelta.progress import Progress


def stack(
    *deltas: AnyDelta,
    base: AnyPath | None = None,
    progress: Progress | None = None,
    spool_dir: str | None = None,
) -> Delta:
    """Return the one delta that does what all do.

    Deltas each made from the target of the one before it are a chain: applying the stack is
    applying them in order. Deltas made from one base are siblings: where none touches what another
    does, the stack has the changes of all.

    Args:
        deltas: ``.sd`` files or loaded deltas; at least one.
        base: the base of the first. It is needed where differences and new values meet in a tensor,
            where siblings change the same tensor, and where changes were coded with its help. Given, positions
            that return to the base are found in tensors that hold new values too.
        progress: told of the bytes read.
        spool_dir: where coded changes wait if they outgrow memory; None: the system's choice.

    Raises:
        ConflictError: they are neither chain nor siblings, or siblings that change the same.
        FormatError: one cannot be read, or is inconsistent, with itself or its neighbour.
        MismatchError: ``base`` is not the base.
    """
    with ExitStack() as context:
        given = [context.enter_context(opened(one)) for one in deltas]
        for one in given:
            one.check_output()
        siblings = relation(given) == "siblings"
        checkpoint, found = None, []
        if base is not None:
            checkpoint = context.enter_context(open_base(base, given[0]))
            context.enter_context(explained(given[0], checkpoint))
            check_base_files(given[0], checkpoint)
            found = [find_base(one, checkpoint) for one in (given if siblings else given[:1])]
        payload = context.enter_context(new_payload(spool_dir))
        stacking = Siblings if siblings else Chain
        return stacking(given, checkpoint, found, payload, progress).run()
