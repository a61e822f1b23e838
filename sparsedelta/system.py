"""What operating systems do differently, each with a way that works everywhere.

Where Linux or macOS can do something in one step and others cannot, the function says so.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform != "win32":
    import fcntl
    import resource

_COMMON = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
OPEN = os.O_RDONLY | _COMMON | getattr(os, "O_NONBLOCK", 0)
CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _COMMON
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_MANY_FILES = 10_000  # macOS refuses more than its own limit of 10,240
_FEW_FILES = 32  # that every process may open besides those it has
_HERE = {"linux": -100, "darwin": -2}.get(sys.platform, 0)  # AT_FDCWD
_EXCHANGE = 2  # RENAME_EXCHANGE, and RENAME_SWAP of macOS
_NEW_NAME = 4 if sys.platform == "darwin" else 1  # RENAME_EXCL, and RENAME_NOREPLACE of Linux
# ext2 to ext4, XFS, Btrfs, tmpfs, F2FS, ZFS, bcachefs and overlayfs, as statfs(2) names them
_LOCAL = {0xEF53, 0x58465342, 0x9123683E, 0x1021994, 0xF2F52010, 0x2FC12FC1, 0xCA451A4E, 0x794C7630}
_MAC_FLAGS, _MAC_LOCAL = slice(64, 68), 0x1000  # f_flags of struct statfs, MNT_LOCAL

_seeking = threading.Lock()  # a file has one position for all threads


def read_into(fd: int, buffer: memoryview, offset: int) -> int:
    """Fill as much of ``buffer`` as one read gives; return how many bytes, 0 at the end of the file."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [buffer], offset)
    data = read_at(fd, len(buffer), offset)
    buffer[: len(data)] = data
    return len(data)


def read_at(fd: int, n_bytes: int, offset: int) -> bytes:
    """Return up to ``n_bytes`` bytes of a file, none at its end."""
    if hasattr(os, "pread"):
        return os.pread(fd, n_bytes, offset)
    with _seeking:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.read(fd, n_bytes)


def write_at(fd: int, data: memoryview, offset: int) -> int:
    """Write the start of ``data``; return how many bytes were written."""
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, data, offset)
    with _seeking:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, data)


def allow_open_files(n_files: int) -> None:
    """Let this process hold ``n_files`` more files open, as far as the system lets it choose.

    Every shard of base and output is one, and the usual limit is 256 or 1,024.
    """
    if sys.platform == "win32" or n_files <= _FEW_FILES:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MANY_FILES if hard == resource.RLIM_INFINITY else min(hard, _MANY_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def n_free_bytes(folder: Path) -> int | None:
    """Return how many bytes fit on the disk of a folder; None: some network file systems know nothing."""
    if not hasattr(os, "statvfs"):
        return shutil.disk_usage(folder).free
    system = os.statvfs(folder)
    return system.f_bfree * system.f_frsize if system.f_blocks else None


def reserve(fd: int, n_bytes: int) -> None:
    """Give a new, empty file its size, and blocks on the disk where the file system can.

    With blocks reserved at once, writing costs a third less and does not wait for what is written
    out. ``os.posix_fallocate`` will not do: where the system cannot, it writes to every block.

    Raises:
        OSError: there is no room.
    """
    fallocate = getattr(_libc(), "fallocate", None)  # Linux only
    if fallocate is not None and n_bytes:
        offset_type = ctypes.c_int64
        fallocate.argtypes = (ctypes.c_int, ctypes.c_int, offset_type, offset_type)
        if fallocate(fd, 0, 0, n_bytes) and (number := ctypes.get_errno()) in NO_ROOM:
            raise OSError(number, os.strerror(number))
    os.truncate(fd, n_bytes)


def exchange(one: Path, other: Path) -> bool:
    """Give two files or folders each other's name in one step; return False where that cannot be done."""
    return not _rename(one, other, _EXCHANGE)


def rename_new(old: Path, new: Path) -> bool:
    """Rename a file in one step; return False where the system cannot keep from replacing another.

    Raises:
        FileExistsError: there is something of the new name.
    """
    number = _rename(old, new, _NEW_NAME)
    if number == errno.EEXIST:
        raise FileExistsError(number, os.strerror(number), str(new))
    return not number


def _rename(old: Path, new: Path, flags: int) -> int:
    """Return the number of the error of the system's call, 0 if there is none."""
    libc = _libc()
    rename = getattr(libc, "renameat2", None) or getattr(libc, "renameatx_np", None)
    if rename is None:
        return errno.ENOSYS
    failed = rename(_HERE, os.fsencode(old), _HERE, os.fsencode(new), flags)
    return ctypes.get_errno() if failed else 0


def sync_folder(path: Path) -> None:
    """Make the names in a folder last, where the system lets a program do that."""
    if sys.platform == "win32":
        return
    fd = os.open(path, OPEN)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def is_local(path: Path) -> bool:
    """Return whether a folder is surely on a disk of this machine, where ``locked`` sees every process."""
    libc = _libc()
    found = ctypes.create_string_buffer(4096)  # more than any system's struct statfs
    statfs = getattr(libc, "statfs$INODE64", None) or getattr(libc, "statfs", None)
    if statfs is None or statfs(os.fsencode(path), found):
        return False
    if sys.platform == "darwin":
        return bool(int.from_bytes(found.raw[_MAC_FLAGS], sys.byteorder) & _MAC_LOCAL)
    return ctypes.c_ulong.from_buffer(found).value in _LOCAL


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Lock a folder until the end, or until this process ends in whatever way; only where ``is_local``.

    Yields:
        Whether it is locked: False if another process has locked it, or removed it just now.
    """
    try:
        fd = os.open(folder, OPEN)
    except FileNotFoundError:
        yield False
        return
    try:
        yield _flock(fd) and folder.exists()
    finally:
        os.close(fd)


def _flock(fd: int) -> bool:
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _libc() -> ctypes.CDLL | None:
    return None if sys.platform == "win32" else ctypes.CDLL(None, use_errno=True)
