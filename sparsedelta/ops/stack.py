"""``stack``: combine several deltas into one, exactly, and without their base where possible.

Applying the stack gives the same tensors and files as applying the deltas one after the other. The stack
is computed tensor by tensor and chunk by chunk, for any number of deltas.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from sparsedelta._typing import AnyPath
from sparsedelta.files.side_files import check_base_files
from sparsedelta.format.delta import AnyDelta, Delta, opened_all
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
    """Return one delta with the effect of all ``deltas``.

    If each delta was made from the target of the one before it, they are a chain. Applying the stack
    then gives the same result as applying them in order. If all were made from the same base, they are
    siblings. The stack then has the changes of all of them. No two siblings may touch the same element.

    Args:
        deltas: ``.sd`` files, loaded deltas, or files and folders of other forms that ``convert`` reads; at least
            one. One of another form is read as part of a chain, and needs ``base``.
        base: the base of the first delta. It is required if a tensor is changed by differences in one
            delta and by new values in another, if several siblings change the same tensor, or if changes
            were coded with the help of the base. If it is given, the stack also leaves out elements whose
            new value equals the base's.
        progress: receives the number of bytes read.
        spool_dir: folder for the temporary file that holds the coded changes if they do not fit in memory;
            None for the system's temporary folder.

    Raises:
        BaseNeeded: ``base`` is required, but not given; the message says why.
        ConflictError: the deltas are neither a chain nor siblings, or siblings touch the same elements.
        FormatError: a delta cannot be read, or is inconsistent with itself or with the next delta.
        MismatchError: ``base`` is not the base of the first delta.
    """
    with opened_all(deltas, base) as given:
        return _stacked(given, base, progress, spool_dir, siblings=relation(given) == "siblings")


def stack_chain(deltas: Sequence[Delta], base: AnyPath) -> Delta:
    """Return one delta with the effect of deltas that are known to be a chain; see ``stack``.

    Raises:
        ConflictError: a delta was not made from the target of the one before it.
        FormatError, MismatchError: as for ``stack``.
    """
    return _stacked(deltas, base, None, None, siblings=False)


def _stacked(
    given: Sequence[Delta],
    base: AnyPath | None,
    progress: Progress | None,
    spool_dir: str | None,
    *,
    siblings: bool,
) -> Delta:
    with ExitStack() as context:
        for one in given:
            one.check_output()
        checkpoint, found = None, []
        if base is not None:
            checkpoint = context.enter_context(open_base(base, given[0]))
            context.enter_context(explained(given[0], checkpoint))
            found = [find_base(one, checkpoint) for one in (given if siblings else given[:1])]
            check_base_files(given[0], checkpoint)
        payload = context.enter_context(new_payload(spool_dir))
        stacking = Siblings if siblings else Chain
        return stacking(given, checkpoint, found, payload, progress).run()
