"""Opening files for reading: only regular ones, so that nothing waits for the other end of a pipe."""

from __future__ import annotations

import errno
import os
import stat


def open_regular(path: str | os.PathLike[str]) -> int:
    """Return the descriptor of a regular file, open for reading.

    Raises:
        OSError: it cannot be opened, or is a folder, a pipe or a device; the path is named.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return fd
    os.close(fd)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "A folder, expected a file", os.fspath(path))
    raise OSError(errno.EINVAL, "Not a regular file; copy it into one first", os.fspath(path))
