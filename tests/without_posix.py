"""Imports every module and runs the commands on a Python without what only POSIX has, such as that of Windows.

Windows has other paths, other rules for open files and other errors, which this cannot show.
"""

from __future__ import annotations

import os
import pkgutil
import shutil
import signal
import sys
import threading
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

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
    vars(shutil)["disk_usage"] = lambda path: SimpleNamespace(free=1 << 40)


def run(*words: str) -> None:
    """Run a command; it must succeed."""
    from sparsedelta.cli import main

    result = click.testing.CliRunner().invoke(main, words)
    if result.exit_code:
        raise SystemExit(f"{words}: {result.output}") from result.exception


def main() -> None:
    """Work in the current folder, which holds ``base`` and ``target``."""
    remove_posix()
    import sparsedelta

    for module in pkgutil.walk_packages(sparsedelta.__path__, "sparsedelta."):
        if not module.name.endswith(("__main__", "triton_kernels")):  # the latter needs Triton
            import_module(module.name)
    for more in ((), ("--overwrite",)):
        run("diff", "base", "target", "-o", "delta.sd", *more)
        run("apply", "base", "delta.sd", "out", *more)
        run("invert", "delta.sd", "--base", "base", "-o", "undo.sd", *more)
        run("apply", "target", "undo.sd", "back", *more)
        run("stack", "delta.sd", "undo.sd", "-o", "nothing.sd", *more)
    run("verify", "delta.sd", "--base", "base", "--target", "out")
    run("inspect", "delta.sd")
    sys.stdout.write(f"{sorted(path.name for path in Path().iterdir())}\n")


if __name__ == "__main__":
    main()
