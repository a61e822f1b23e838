"""Files on disk: inputs are regular files, and outputs appear complete or not at all.

Only regular files are opened, because opening a pipe could wait for ever. Outputs are written
under a temporary name in the same folder, synced, then renamed.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from queue import Empty, SimpleQueue

from sparsedelta import system
from sparsedelta.interrupts import uninterrupted

_WRITE_OUT_SECONDS = 0.1
_SYNCED_AT_ONCE = 16  # files
_PARTIAL, UNLOCKED = ".sparsedelta.partial", ".sparsedelta-unlocked.partial"


def open_regular(path: str | os.PathLike[str]) -> int:
    """Return the descriptor of a regular file, open for reading.

    Raises:
        OSError: ``path`` cannot be opened, or is a folder, a pipe or a device. The error names it.
    """
    try:
        fd = os.open(path, system.OPEN)
    except PermissionError:
        if os.path.isdir(path):  # Windows does not open folders
            raise _folder_error(path) from None
        raise
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return fd
    os.close(fd)
    if stat.S_ISDIR(mode):
        raise _folder_error(path)
    raise OSError(
        errno.EINVAL, "Not a regular file; copy it to a regular file first", os.fspath(path)
    )


def _folder_error(path: str | os.PathLike[str]) -> IsADirectoryError:
    return IsADirectoryError(errno.EISDIR, "This is a folder, expected a file", os.fspath(path))


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """Write all bytes to a file at ``offset``."""
    while data:
        n_written = system.write_at(fd, data, offset)
        data = data[n_written:]
        offset += n_written


@contextmanager
def staged_output(
    path: str | os.PathLike[str], *, overwrite: bool, durable: bool = True
) -> Iterator[Path]:
    """Yield a temporary path for a new file or folder; rename it to ``path`` at the end.

    The caller must sync the files it writes; the folders are synced here, if ``durable``. On any
    exception the new file or folder is removed, and ``path`` stays as it was.

    Raises:
        FileExistsError: ``path`` exists and ``overwrite`` is false.
        FileNotFoundError: the parent folder of ``path`` does not exist.
    """
    final = Path(os.path.abspath(path))
    check_absent(Path(path), overwrite=overwrite)
    if not final.parent.is_dir():
        raise FileNotFoundError(
            f"the folder of output '{os.fspath(path)}' does not exist; create it first"
        )
    remove_abandoned(final.parent)
    with work_folder(final) as work:
        result = work / "new"
        try:
            yield result
            for folder, _, _ in os.walk(result) if durable else ():
                system.sync_folder(Path(folder))
            check_absent(Path(path), overwrite=overwrite)
            _rename(result, final)
            if durable:
                system.sync_folder(final.parent)
        except BaseException as error:
            name_full_disk(error, final)
            raise


def _rename(new: Path, final: Path) -> None:
    """Rename ``new`` to ``final``. What was at ``final`` is afterwards at ``new``, or is deleted."""
    is_folder = new.is_dir() or (final.is_dir() and not final.is_symlink())
    if not is_folder or not os.path.lexists(final):
        new.replace(final)
    elif not system.exchange(new, final):
        # A rename can replace a file with a file, but not a file with a folder or a folder with a file. A
        # process that is killed between the two renames leaves the old output under the name ``old``.
        old = final.with_name(new.parent.name[1:].rpartition(".sparsedelta")[0] + ".replaced")
        try:
            final.rename(old)
            new.replace(final)
        except BaseException:
            if os.path.lexists(old) and not os.path.lexists(final):
                old.rename(final)
            raise
        old.rename(new)


@contextmanager
def work_folder(final: Path) -> Iterator[Path]:
    """Yield a new folder beside ``final``, which is removed at the end, or by a later run if this process is killed.

    This process holds a lock on the folder. If the process is killed, a later run finds the folder
    unlocked and removes it. On file systems where locks are not reliable, the folder's name ends in
    ``UNLOCKED``, and ``remove_abandoned`` does not remove it.
    """
    is_local = system.is_local(final.parent)
    suffix = _PARTIAL if is_local else UNLOCKED
    while True:
        work = final.with_name(f".{final.name[:40]}.{secrets.token_hex(8)}{suffix}")
        try:
            work.mkdir(0o700)
            with system.locked(work) if is_local else nullcontext(True) as is_mine:
                if is_mine:  # else another run locked it first, and removes it
                    yield work
                    return
        except OSError as error:
            _name_output(error, work, final)
            raise
        finally:
            try:
                shutil.rmtree(work, ignore_errors=True)
            finally:  # again, in case an interrupt stopped the first call
                shutil.rmtree(work, ignore_errors=True)


def _name_output(error: OSError, work: Path, final: Path) -> None:
    """Replace the name of a hidden folder in an error by that of the output, which the user knows."""
    if str(error.filename).startswith(str(work)):
        error.filename = str(final)
        if error.filename2 is not None:
            del error.filename2  # None would be shown as the name of a file


@contextmanager
def temporary_folder(purpose: str) -> Iterator[Path]:
    """Yield a new folder in the system's temporary folder; it is removed at the end.

    Folders that killed processes left there are removed first, as ``remove_abandoned`` does.
    """
    place = Path(tempfile.gettempdir())
    remove_abandoned(place)
    with work_folder(place / f"sparsedelta-{purpose}") as work:
        yield work


def remove_abandoned(folder: Path) -> None:
    """Remove the work folders that killed processes left in ``folder``."""
    with suppress(OSError):
        for work in folder.glob(f".*{_PARTIAL}"):
            with suppress(OSError), system.locked(work) as is_abandoned:
                if is_abandoned:
                    shutil.rmtree(work, ignore_errors=True)


def check_absent(path: Path, *, overwrite: bool) -> None:
    """Raise FileExistsError if ``path`` exists, and ``overwrite`` is false or it is a device or pipe."""
    if not os.path.lexists(path):
        return
    if not (path.is_symlink() or path.is_file() or path.is_dir()):
        raise FileExistsError(
            f"output '{path}' is a device, pipe or socket, which would be replaced; give the name of a file"
        )
    if not overwrite:
        raise FileExistsError(
            f"output '{path}' exists; choose another name, or overwrite it (overwrite=True, --overwrite)"
        )


def check_no_slash(path: str | os.PathLike[str], example: str = "delta.sd") -> None:
    """Raise IsADirectoryError if the name of an output that is one file ends like that of a folder.

    Args:
        path: the output as the user wrote it; a ``Path`` has no slash at its end.
        example: name of a file in the folder; used in the error.
    """
    text = os.fspath(path)
    if text.endswith(("/", os.sep)):
        raise IsADirectoryError(
            f"output '{text}' is written like a folder, but the output is one file; give the name of a"
            f" file, such as '{text}{example}'"
        )


def check_no_folder(path: str | os.PathLike[str]) -> None:
    """Raise IsADirectoryError if ``path`` is a folder: a file must not replace a folder."""
    if os.path.isdir(path):
        raise IsADirectoryError(
            errno.EISDIR,
            "This is a folder, but the output is one file; give the name of a file",
            os.fspath(path),
        )


def overlap(one: Path, other: Path) -> bool:
    """Return whether two resolved paths are equal, or one contains the other."""
    return one == other or one in other.parents or other in one.parents


def check_checkpoint_folder(path: Path) -> None:
    """Check that the folder of a checkpoint may be written at ``path``, or replace what is there.

    Raises:
        NotADirectoryError: ``path`` is a file or a link, or named like a weight file. Most likely the user forgot to name
            the output.
        FileExistsError: ``path`` is a folder that is not empty and holds no safetensors file.
    """
    if not os.path.lexists(path):
        if path.suffix == ".safetensors":
            raise NotADirectoryError(
                f"output '{path}' is named like a weight file, but the output is a folder; give the name of a folder"
            )
        return
    if path.is_symlink() and path.is_dir():
        raise NotADirectoryError(
            f"output '{path}' is a link to a folder, and is not replaced; give that folder, '{os.path.realpath(path)}'"
        )
    if path.is_symlink() or not path.is_dir():
        raise NotADirectoryError(
            f"output '{path}' is a file, but the output is a folder; give the output folder as the"
            " last argument"
        )
    if any(path.iterdir()) and not any(path.rglob("*.safetensors")):
        raise FileExistsError(
            f"output '{path}' is a folder that holds other files but no safetensors file, so it is not"
            " replaced; choose another name"
        )


def check_room(path: Path, n_bytes: int) -> None:
    """Raise OSError if ``n_bytes`` do not fit on the disk of ``path``.

    Some network file systems do not report their free space; then nothing is raised.
    """
    free = system.n_free_bytes(path.parent)
    if free is not None and n_bytes > free:
        raise OSError(
            errno.ENOSPC,
            f"The output takes {n_bytes} bytes, but only {free} are free; free some space or choose"
            " another disk",
        )


def name_full_disk(error: BaseException, path: str | os.PathLike[str]) -> None:
    """Add ``path`` to a disk-full error that names no file; errors of write calls do not name one."""
    if isinstance(error, OSError) and error.errno in system.NO_ROOM and error.filename is None:
        error.filename = os.fspath(path)


@contextmanager
def synced(fds: Sequence[int]) -> Iterator[None]:
    """Return a context in which the caller writes to open files; at its end they are synced.

    A thread also syncs the files meanwhile, so that the disk is busy while the caller decodes.

    Raises:
        OSError: the system could not write.
    """
    done: SimpleQueue[None] = SimpleQueue()  # not an Event: an interrupt may leave its lock held
    failures: list[OSError] = []

    def write_out() -> None:
        try:
            while True:
                try:
                    return done.get(timeout=_WRITE_OUT_SECONDS)
                except Empty:
                    for fd in fds:
                        os.fsync(fd)
        except OSError as error:  # the system reports it only once, so not to the sync below
            failures.append(error)

    thread = threading.Thread(target=write_out)
    with uninterrupted():
        thread.start()
    try:
        yield
    finally:
        with (
            uninterrupted()
        ):  # after an interrupted join, Python believes that the thread has ended
            done.put(None)
            thread.join()
    for failure in failures:
        raise failure
    _sync(fds)


def _sync(fds: Sequence[int]) -> None:
    """Sync open files, several at the same time: file systems write what these wait for in one step.

    Raises:
        OSError: the system could not write.
    """
    left = iter(fds)  # shared by the threads
    failures: list[OSError] = []

    def run() -> None:
        try:
            for fd in left:
                os.fsync(fd)
        except OSError as error:
            failures.append(error)

    threads: list[threading.Thread] = []
    try:
        with uninterrupted():
            for _ in range(min(len(fds), _SYNCED_AT_ONCE) - 1):
                thread = threading.Thread(target=run)
                thread.start()
                threads.append(thread)
        run()
    finally:
        with uninterrupted():
            for _ in left:  # after a failure or an interrupt, the other threads end early
                pass
            for thread in threads:
                thread.join()
    for failure in failures:
        raise failure
