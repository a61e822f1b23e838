"""Imports every module and runs the commands on a Python without what only POSIX has, such as that of Windows.

Files that are open can be neither renamed, replaced nor removed, a rename replaces nothing, a folder cannot be opened, and
only a file that is open for writing can be synced, as on Windows. Paths and some errors of Windows are other ones still.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import blake3
import click.testing
import numpy as np
import rich.progress
import zstandard

MODULES = ("fcntl", "grp", "pwd", "resource", "termios")
OF_OS = (
    "chown fchmod fchown fork getegid geteuid getgid getuid killpg mkfifo openpty posix_fadvise posix_fallocate"
    " copy_file_range pread preadv pwrite pwritev sched_getaffinity setsid statvfs sync sysconf uname"
    " O_CLOEXEC O_DIRECT O_DIRECTORY O_NOFOLLOW O_NONBLOCK O_PATH O_TMPFILE"
).split()
OF_SIGNAL = "SIGHUP SIGKILL SIGPIPE SIGUSR1 SIGUSR2 SIGALRM alarm pthread_sigmask setitimer".split()
USED = (blake3, click.testing, np, rich.progress, threading, zstandard)  # imported as they are


def remove_posix() -> None:
    """Remove what Windows lacks, and name the platform so."""
    for module, names in ((os, OF_OS), (signal, OF_SIGNAL)):
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    for name in MODULES:
        sys.modules[name] = None  # type: ignore[assignment]  # import then fails
    sys.platform = "win32"
    # The standard library of this system needs these calls for what that of Windows does without them.
    shutil._use_fd_functions = False  # type: ignore[attr-defined]
    tempfile._O_TMPFILE_WORKS = False  # type: ignore[attr-defined]
    vars(shutil)["disk_usage"] = lambda path: SimpleNamespace(free=1 << 40)


def open_files() -> list[str]:
    """Return the paths of the files that this process has open."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:  # that of the listing itself
            continue
    return found


def check_closed(path: Any) -> None:
    """Raise PermissionError if a file is open, or a file in a folder."""
    place = os.path.abspath(os.fspath(path))
    for held in open_files():
        if held == place or held.startswith(place + os.sep):
            raise PermissionError(errno.EACCES, f"in use by this process: {held}", place)


def refuse_like_windows() -> None:
    """Replace calls by those that refuse what Windows refuses."""
    plain: dict[str, Callable[..., Any]] = {
        name: getattr(os, name)
        for name in ("open", "fsync", "rename", "replace", "unlink", "remove", "rmdir")
    }

    def open_file(path: Any, flags: int, *more: Any, **options: Any) -> int:
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        fd: int = plain["open"](path, flags, *more, **options)
        return fd

    def fsync(fd: int) -> None:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        plain["fsync"](fd)

    def rename(old: Any, new: Any) -> None:
        if os.path.lexists(new):
            raise FileExistsError(errno.EEXIST, "File exists", os.fspath(old), None, os.fspath(new))
        check_closed(old)
        plain["rename"](old, new)

    def replace(old: Any, new: Any) -> None:
        if os.path.isdir(new):
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(new))
        check_closed(old)
        check_closed(new)
        plain["replace"](old, new)

    def removing(name: str) -> Callable[..., None]:
        def remove(path: Any, **options: Any) -> None:
            if (
                sys._getframe(1).f_globals["__name__"] != "tempfile"
            ):  # which has its own way on Windows
                check_closed(path)
            plain[name](path, **options)

        return remove

    vars(os).update(open=open_file, fsync=fsync, rename=rename, replace=replace)
    vars(os).update({name: removing(name) for name in ("unlink", "remove", "rmdir")})


def run(*words: str) -> None:
    """Run a command; it must succeed."""
    from sparsedelta.cli import main

    result = click.testing.CliRunner().invoke(main, words)
    if result.exit_code:
        shown = traceback.format_exception(result.exception)
        raise SystemExit(f"{words}: {result.output}\n{''.join(shown)}")


def main() -> None:
    """Work in the current folder, which holds ``base`` and ``target``."""
    remove_posix()
    refuse_like_windows()
    import sparsedelta

    root = Path(sparsedelta.__path__[0])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        # These need torch and Triton at once.
        if parts[0] != "distributed" and parts[-1] not in ("__main__", "triton_kernels"):
            import_module(".".join(("sparsedelta", *parts)).removesuffix(".__init__"))
    for more in ((), ("--overwrite",)):
        run("diff", "base", "target", "-o", "delta.sd", *more)
        run("apply", "base", "delta.sd", "out", *more)
        run("invert", "delta.sd", "--base", "base", "-o", "undo.sd", *more)
        run("apply", "target", "undo.sd", "back", *more)
        run("stack", "delta.sd", "undo.sd", "-o", "nothing.sd", *more)
    run("verify", "delta.sd", "--base", "base", "--target", "out")
    run("inspect", "delta.sd")
    run("inspect", "delta.sd", "--html", "page.html")
    run("doctor")
    run("merge", "base", "delta.sd", "-o", "merged.sd")
    run("convert", "delta.sd", "other", "--base", "base", "--to", "slime", "--lossy")
    run("convert", "other", "again.sd", "--base", "base")
    run("apply", "base", "other", "rebuilt")
    shutil.rmtree("rebuilt")
    from sparsedelta.channel import objects

    vars(objects)["_MEMORY_BYTES"] = 100  # so that objects go through temporary files
    for checkpoint in ("base", "target", "base", "target"):
        run("publish", "channel", checkpoint)
        run("follow", "channel", "followed", "--once")
    run("prune", "channel", "--keep", "1")
    run("log", "channel")
    run("verify", "delta.sd", "--base", "base", "--target", "followed")
    sys.stdout.write(f"{sorted(path.name for path in Path().iterdir())}\n")


if __name__ == "__main__":
    main()
