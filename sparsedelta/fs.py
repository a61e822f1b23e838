"""Files on disk: inputs that are regular files, and outputs that appear whole or not at all.

Only regular files are opened, so that nothing waits for the other end of a pipe. Outputs are written
beside their place, synced, then renamed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import stat
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

if sys.platform != "win32":
    import resource

_MANY_FILES = 10_000  # macOS refuses more than its own limit of 10,240
_FEW_FILES = 32  # that every process may open besides those it has
_WRITE_OUT_SECONDS = 0.1
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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


@contextmanager
def staged_output(path: str | os.PathLike[str], *, overwrite: bool) -> Iterator[Path]:
    """Yield a fresh name beside ``path`` for a file or folder; give it the name ``path`` at the end.

    The caller syncs the files it writes; the folders are synced here. On any exception what was
    written is removed and ``path`` is as it was.

    Raises:
        FileExistsError: ``path`` exists and ``overwrite`` is false.
        FileNotFoundError: the folder that should hold ``path`` does not exist.
    """
    final = Path(os.path.abspath(path))
    check_absent(final, overwrite=overwrite)
    if not final.parent.is_dir():
        raise FileNotFoundError(f"folder '{final.parent}' does not exist; create it first")
    work = Path(
        tempfile.mkdtemp(prefix=f".{final.name[:40]}.", suffix=".partial", dir=final.parent)
    )
    try:
        result = work / "new"
        yield result
        _sync_folders(result)
        check_absent(final, overwrite=overwrite)
        is_folder = result.is_dir() or (final.is_dir() and not final.is_symlink())
        if is_folder and os.path.lexists(final):
            final.rename(work / "old")  # only a file can replace, and only a file, in one step
        result.replace(final)
        _sync_folder(final.parent)
    except BaseException as error:
        if os.path.lexists(work / "old") and not os.path.lexists(final):
            (work / "old").rename(final)
        name_full_disk(error, final)
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check_absent(path: Path, *, overwrite: bool) -> None:
    """Raise FileExistsError if something is at ``path`` and may not be replaced."""
    if not overwrite and os.path.lexists(path):
        raise FileExistsError(
            f"output '{path}' exists; choose another name, or overwrite it (--overwrite)"
        )


def check_no_folder(path: Path) -> None:
    """Raise IsADirectoryError if a folder is at ``path``: one file may not replace all that is in it."""
    if path.is_dir():
        raise IsADirectoryError(
            errno.EISDIR, "A folder, and the output is one file; give the name of a file", str(path)
        )


def check_checkpoint_folder(path: Path) -> None:
    """Check that what is at ``path``, if anything, may be replaced by the folder of a checkpoint.

    Raises:
        NotADirectoryError: it is a file: most likely the name of the output was forgotten.
        FileExistsError: it is a folder in which there is something, but no checkpoint.
    """
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_dir():
        raise NotADirectoryError(
            f"output '{path}' is a file, and the output is a folder; give the name of the output last"
        )
    if any(path.iterdir()) and not any(path.rglob("*.safetensors")):
        raise FileExistsError(
            f"output '{path}' is a folder without a safetensors file, no checkpoint to overwrite;"
            " choose another name"
        )


def check_room(path: Path, n_bytes: int) -> None:
    """Raise OSError if ``n_bytes`` will not fit where ``path`` is to be, as far as the system knows."""
    system = os.statvfs(path.parent)
    free = system.f_bfree * system.f_frsize
    if system.f_blocks and n_bytes > free:  # some network file systems know nothing
        raise OSError(
            errno.ENOSPC,
            f"The output takes {n_bytes} bytes, {free} are free; make room or choose another place",
        )


def reserve(fd: int, n_bytes: int) -> None:
    """Give a new, empty file its size, and blocks on the disk where the file system can.

    With blocks reserved at once, writing costs a third less and does not wait for what is written
    out. ``os.posix_fallocate`` will not do: where the system cannot, it writes to every block.

    Raises:
        OSError: there is no room.
    """
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)  # Linux only
    if fallocate is not None and n_bytes:
        offset_type = ctypes.c_int64
        fallocate.argtypes = (ctypes.c_int, ctypes.c_int, offset_type, offset_type)
        if fallocate(fd, 0, 0, n_bytes) and (number := ctypes.get_errno()) in _NO_ROOM:
            raise OSError(number, os.strerror(number))
    os.truncate(fd, n_bytes)


def name_full_disk(error: BaseException, path: str | os.PathLike[str]) -> None:
    """Make an error that says that there is no room say where: the system's writing calls do not."""
    if isinstance(error, OSError) and error.errno in _NO_ROOM and error.filename is None:
        error.filename = os.fspath(path)


@contextmanager
def synced(fds: Sequence[int]) -> Iterator[None]:
    """Let the caller fill open files; all of their content is on disk at the end.

    A thread begins to write it out meanwhile: waiting for a disk takes none of the time that
    digesting and decoding take.

    Raises:
        OSError: the system could not write.
    """
    done = threading.Event()
    failures: list[OSError] = []

    def write_out() -> None:
        try:
            while not done.wait(_WRITE_OUT_SECONDS):
                for fd in fds:
                    os.fsync(fd)
        except OSError as error:  # told to one caller only: the sync below would not see it again
            failures.append(error)

    thread = threading.Thread(target=write_out)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    for failure in failures:
        raise failure
    for fd in fds:
        os.fsync(fd)


def _sync_folders(path: Path) -> None:
    if path.is_dir():
        for folder, _, _ in os.walk(path):
            _sync_folder(Path(folder))


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
