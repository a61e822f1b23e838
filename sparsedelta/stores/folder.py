"""A folder as a store of objects. Each object is a file, which is either complete or absent under its name.

An object is written to a work folder ``.object.….partial`` first. Symbolic links are never followed.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path

from sparsedelta import system
from sparsedelta.errors import LimitExceeded
from sparsedelta.fs import UNLOCKED, name_full_disk, remove_abandoned, work_folder
from sparsedelta.stores.base import ByteSource
from sparsedelta.stores.local import OpenFile
from sparsedelta.stores.names import check_name, is_name
from sparsedelta.stores.objects import Content

_NOT_PERMITTED = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL)
_ABANDONED_SECONDS = 24 * 60 * 60  # used where locks do not work; longer than any write takes


class FolderStore:
    """The files of a folder (``sparsedelta.stores.objects.ObjectStore``).

    The first write creates the folder. Its parent folder must exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._root = Path(os.path.realpath(path))
        self.name = str(self._root)
        place = self._root if self._root.exists() else self._root.parent
        self.writable = os.access(place, os.W_OK | os.X_OK)

    @cached_property
    def has_create(self) -> bool:
        """Whether this file system can rename a file in one step without replacing another file."""
        if not self.writable:
            return False
        with self._work_folder() as work:
            one, other = work / "one", work / "other"
            one.touch()
            return _give_new_name(one, other)

    def read(self, name: str, max_bytes: int) -> bytes | None:
        """Return the content of an object, at most ``max_bytes`` bytes; None if it does not exist."""
        source = self.open(name)
        if source is None:
            return None
        try:
            if source.n_bytes > max_bytes:
                raise LimitExceeded(
                    f"object '{source.name}' has more than {max_bytes} bytes, which is the limit"
                )
            parts, n_read = [], 0
            while part := source.read(n_read, source.n_bytes - n_read):
                parts.append(part)
                n_read += len(part)
            return b"".join(parts)
        finally:
            source.close()

    def open(self, name: str) -> ByteSource | None:
        """Return an object to read by range; None if it does not exist."""
        try:
            return OpenFile(self._place(name))
        except FileNotFoundError:
            return None

    def create(self, name: str, content: Content) -> bool:
        """Write an object if none has this name; return whether it was written.

        If ``has_create`` is false, this may replace an object that another writer creates meanwhile.
        """
        final = self._place(name)
        if os.path.lexists(final):
            return False
        with self._written(final, content) as new:
            try:
                if not _give_new_name(new, final):
                    if os.path.lexists(final):
                        return False
                    new.replace(final)
            except FileExistsError:
                return False
        return True

    def write(self, name: str, content: Content) -> None:
        """Write an object. An object with this name is replaced."""
        final = self._place(name)
        with self._written(final, content) as new:
            new.replace(final)

    def delete(self, name: str) -> None:
        """Remove an object if it exists."""
        self._place(name).unlink(missing_ok=True)

    def list(self, prefix: str) -> list[str]:
        """Return the names that begin with ``prefix``, sorted."""
        folder = prefix.rpartition("/")[0]
        if folder and not is_name(folder):
            return []
        start = self._place(folder) if folder else self._root
        found = (path.relative_to(self._root).as_posix() for path in _files(start))
        return sorted(name for name in found if name.startswith(prefix) and is_name(name))

    def close(self) -> None:
        """Do nothing: no file is held open."""

    def _place(self, name: str) -> Path:
        """Return the path of an object.

        Raises:
            OSError: a part of the path is a symbolic link.
        """
        place = self._root.joinpath(*check_name(name).split("/"))
        if os.path.realpath(place) != str(place):
            raise OSError(
                errno.ELOOP,
                "A symbolic link in a store of objects; use a file or folder",
                str(place),
            )
        return place

    @contextmanager
    def _written(self, final: Path, content: Content) -> Iterator[Path]:
        """Yield a complete, synced file; at the end, sync the folder that the caller moved it to."""
        self._make_folder(final.parent)
        try:
            with self._work_folder() as work:
                new = work / "new"
                _write_file(new, content)
                yield new
                system.sync_folder(final.parent)
        except OSError as error:
            name_full_disk(error, final)
            if (
                error.errno in _NOT_PERMITTED
            ):  # in whichever folder, the object is what could not be written
                error.filename, error.filename2 = str(final), None
            raise

    def _make_folder(self, folder: Path) -> None:
        if folder.is_dir():
            return
        if folder != self._root:
            self._make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        system.sync_folder(folder.parent)

    @contextmanager
    def _work_folder(self) -> Iterator[Path]:
        """Remove work folders of killed writers, then yield a new work folder in the store."""
        self._make_folder(self._root)
        remove_abandoned(self._root)
        with work_folder(self._root / "object") as work:
            _remove_old(self._root, work)
            yield work


def _give_new_name(file: Path, new: Path) -> bool:
    """Give a file a new name in one step; return False if the file system cannot do this.

    Raises:
        FileExistsError: a file has this name already.
    """
    try:
        os.link(file, new)
    except FileExistsError:
        # A file server may create the link, lose its answer, and then try again.
        if not os.path.samefile(file, new):
            raise
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return system.rename_new(file, new)
    return True


def _write_file(path: Path, content: Content) -> None:
    with open(path, "xb") as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            with open(content, "rb") as source:
                shutil.copyfileobj(source, file, 1 << 20)
        file.flush()
        os.fsync(file.fileno())


def _remove_old(root: Path, work: Path) -> None:
    """Remove work folders that are a day older than ``work``, by the clock of the file system."""
    if not work.name.endswith(UNLOCKED):
        return
    limit = work.stat().st_mtime - _ABANDONED_SECONDS
    for other in root.glob(f".*{UNLOCKED}"):
        with suppress(OSError):
            if other.stat().st_mtime < limit:
                shutil.rmtree(other, ignore_errors=True)


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder. Links are not followed."""
    try:
        entries = [*os.scandir(folder)]
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _files(Path(entry.path))
        elif entry.is_file(follow_symlinks=False):
            yield Path(entry.path)
