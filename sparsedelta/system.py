"""System calls that differ between operating systems, each with a fallback that works everywhere.

Each docstring says what happens on a system that lacks the call.
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
CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | _COMMON
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_CLONE = 0x40049409  # FICLONE of ioctl_ficlone(2)
_MANY_FILES = 10_000  # macOS refuses more than its own limit of 10,240
_FEW_FILES = 32  # this many more files fit within every usual limit
_AT_FDCWD = {"linux": -100, "darwin": -2}.get(sys.platform, 0)  # relative to the current folder
_EXCHANGE = 2  # RENAME_EXCHANGE on Linux, RENAME_SWAP on macOS
_NEW_NAME = 4 if sys.platform == "darwin" else 1  # RENAME_EXCL on macOS, RENAME_NOREPLACE on Linux
# f_type of statfs(2) for ext2 to ext4, XFS, Btrfs, tmpfs, F2FS, ZFS, bcachefs and overlayfs
_LOCAL = {0xEF53, 0x58465342, 0x9123683E, 0x1021994, 0xF2F52010, 0x2FC12FC1, 0xCA451A4E, 0x794C7630}
_MAC_FLAGS, _MAC_LOCAL = slice(64, 68), 0x1000  # f_flags of struct statfs, MNT_LOCAL

_seek_lock = threading.Lock()  # all threads share one position of a file


def read_into(fd: int, buffer: memoryview, offset: int) -> int:
    """Read once into ``buffer``; return the number of bytes read, 0 at the end of the file."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [buffer], offset)
    data = read_at(fd, len(buffer), offset)
    buffer[: len(data)] = data
    return len(data)


def read_at(fd: int, n_bytes: int, offset: int) -> bytes:
    """Return up to ``n_bytes`` bytes of a file from ``offset``; no bytes at its end."""
    if hasattr(os, "pread"):
        return os.pread(fd, n_bytes, offset)
    with _seek_lock:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.read(fd, n_bytes)


def write_at(fd: int, data: memoryview, offset: int) -> int:
    """Write once from ``data`` to a file at ``offset``; return the number of bytes written."""
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, data, offset)
    with _seek_lock:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, data)


def allow_open_files(n_files: int) -> None:
    """Raise this process's limit of open files so that ``n_files`` more fit, as far as allowed.

    Every shard of base and output is an open file, and the usual limit is 256 or 1,024.
    """
    if sys.platform == "win32" or n_files <= _FEW_FILES:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MANY_FILES if hard == resource.RLIM_INFINITY else min(hard, _MANY_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def n_free_bytes(folder: Path) -> int | None:
    """Return the free bytes on the disk of a folder; None if the file system does not know."""
    if not hasattr(os, "statvfs"):
        return shutil.disk_usage(folder).free
    disk = os.statvfs(folder)
    return (
        disk.f_bfree * disk.f_frsize if disk.f_blocks else None
    )  # some network disks report zeros


def reserve(fd: int, n_bytes: int) -> None:
    """Set the size of a new, empty file, and reserve its disk blocks where the file system can.

    With reserved blocks, writing costs a third less and does not wait for the disk.
    ``os.posix_fallocate`` is not used: where the file system cannot reserve, it writes to every block.

    Raises:
        OSError: the disk is full.
    """
    fallocate = getattr(_libc(), "fallocate", None)  # Linux only
    if fallocate is not None and n_bytes:
        offset_type = ctypes.c_int64
        fallocate.argtypes = (ctypes.c_int, ctypes.c_int, offset_type, offset_type)
        if fallocate(fd, 0, 0, n_bytes) and (number := ctypes.get_errno()) in NO_ROOM:
            raise OSError(number, os.strerror(number))
    os.truncate(fd, n_bytes)


def clone(source: int, target: int) -> bool:
    """Let a new, empty file share all data of another, as on XFS and Btrfs; return False where the system cannot.

    A later change of one file does not change the other.
    """
    if sys.platform != "linux":
        return False
    try:
        fcntl.ioctl(target, _CLONE, source)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise
        return False
    return True


def copy_range(source: int, start: int, target: int, offset: int, n_bytes: int) -> bool:
    """Copy bytes from one file to another within the operating system; return False where it cannot copy all of them."""
    if not hasattr(os, "copy_file_range"):
        return False
    done = 0
    try:
        while done < n_bytes:
            n = os.copy_file_range(source, target, n_bytes - done, start + done, offset + done)
            if not n:
                return False
            done += n
    except OSError as error:
        if error.errno in NO_ROOM:
            raise
        return False
    return True


def exchange(one: Path, other: Path) -> bool:
    """Swap the names of two files or folders in one step; return False where the system cannot."""
    return not _rename(one, other, _EXCHANGE)


def rename_new(old: Path, new: Path) -> bool:
    """Rename a file in one step; return False where the system cannot do so without replacing a file.

    Raises:
        FileExistsError: a file of the new name exists.
    """
    number = _rename(old, new, _NEW_NAME)
    if number == errno.EEXIST:
        raise FileExistsError(number, os.strerror(number), str(new))
    return not number


def _rename(old: Path, new: Path, flags: int) -> int:
    """Return the error number of the system call, 0 if it succeeded."""
    libc = _libc()
    rename = getattr(libc, "renameat2", None) or getattr(libc, "renameatx_np", None)
    if rename is None:
        return errno.ENOSYS
    failed = rename(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), flags)
    return ctypes.get_errno() if failed else 0


def sync_folder(path: Path) -> None:
    """Write the names in a folder to disk; does nothing on Windows, which has no such call."""
    if sys.platform == "win32":
        return
    fd = os.open(path, OPEN)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def is_local(path: Path) -> bool:
    """Return whether a folder is known to be on a local disk, where ``locked`` is reliable."""
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
    """Lock a folder for this process; call it only if ``is_local``.

    The lock ends with the context, or when the process ends for any reason.

    Yields:
        True if the folder is locked. False if another process holds the lock or removed the folder,
        or on Windows.
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
