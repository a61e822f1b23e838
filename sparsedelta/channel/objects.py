"""Deltas and anchors as objects of a store: written under their digest, checked by it before they are used."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from io import BufferedWriter
from pathlib import Path
from typing import IO

from blake3 import blake3

from sparsedelta.channel.entry import Object
from sparsedelta.channel.layout import Kind, object_name
from sparsedelta.channel.versions import Versions
from sparsedelta.errors import BadVersion
from sparsedelta.fs import temporary_folder
from sparsedelta.stores.objects import Content

_MEMORY_BYTES = 32 << 20
_BLOCK_BYTES = 1 << 20


class Pruned(Exception):
    """An object is not in the store any longer."""


def put(channel: Versions, kind: Kind, version: int, blocks: Iterable[bytes]) -> Object:
    """Write the blocks of a delta's file as an object of a version; return its digest and size."""
    with _gathered(blocks) as (content, found):
        channel.store.write(object_name(kind, version, found), content)
    return found


def fetch(channel: Versions, kind: Kind, version: int, expected: Object) -> IO[bytes]:
    """Return a temporary file with an object's bytes, which have the size and digest that the entry names.

    Raises:
        Pruned: it is gone.
        BadVersion: it is another.
    """
    name = object_name(kind, version, expected)
    source = channel.store.open(name)
    if source is None:
        raise Pruned(name)
    file = tempfile.SpooledTemporaryFile(max_size=_MEMORY_BYTES)  # noqa: SIM115 - the caller's
    try:
        hasher, left = blake3(), expected.n_bytes if source.n_bytes == expected.n_bytes else 0
        while left > 0:
            block = source.read(expected.n_bytes - left, min(_BLOCK_BYTES, left))
            if not block:
                break
            hasher.update(block)
            file.write(block)
            left -= len(block)
        if hasher.digest() != expected.digest:
            raise BadVersion(
                f"object {name} of channel '{channel.store.name}' is not what the entry of version {version}"
                " names: it is damaged; publish an anchor",
                expected=expected.digest.hex(),
                found=hasher.hexdigest(),
            )
    except BaseException:
        file.close()
        raise
    finally:
        source.close()
    file.seek(0)
    return file


def _new_file(context: ExitStack) -> BufferedWriter:
    """Return a new temporary file, which is removed at the end of the context.

    It is no ``NamedTemporaryFile``, because Windows does not open such a file a second time.
    """
    folder = context.enter_context(temporary_folder("object"))
    return context.enter_context(open(folder / "object.sd", "xb"))


@contextmanager
def _gathered(blocks: Iterable[bytes]) -> Iterator[tuple[Content, Object]]:
    """Yield content, in memory or in a temporary file if there is much of it, with its digest and size."""
    with ExitStack() as context:
        file = None
        hasher, n_bytes, held = blake3(), 0, list[bytes]()
        for block in blocks:
            hasher.update(block)
            n_bytes += len(block)
            held.append(block)
            if n_bytes > _MEMORY_BYTES:
                file = file or _new_file(context)
                file.writelines(held)
                held.clear()
        if file:
            file.writelines(held)
            file.close()
        content: Content = Path(file.name) if file else b"".join(held)
        yield content, Object(hasher.digest(), n_bytes)
