"""A server process that runs each command line in a fork, which is faster than starting Python.

Modules that read the environment on import, such as huggingface_hub, are imported in each child. Other modules
are imported once, by the server. Requests and answers are lines of JSON on stdin and stdout.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import traceback
import warnings
from typing import Any

PRELOADED = (
    "blake3",
    "click",
    "filelock",
    "httpx",
    "httpx2",
    "numpy",
    "rich.table",
    "tqdm.auto",
    "yaml",
    "zstandard",
    "sparsedelta.ops.apply",
    "sparsedelta.ops.diff",
    "sparsedelta.ops.inspect",
    "sparsedelta.ops.verify",
    "sparsedelta.cli",
)


def run(request: dict[str, Any]) -> int:
    """Run a command line in this process; return its exit code."""
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for name, fd in (("stdout", 1), ("stderr", 2)):
        place = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(place, fd)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "Use 'content=<", DeprecationWarning)
    from sparsedelta.cli import main

    try:
        main(request["arguments"], prog_name="sparsedelta")
    except SystemExit as stop:
        return int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        return 70
    return 0


def serve() -> None:
    """Answer requests until there are no more."""
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            code = run(json.loads(line))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        _, status = os.waitpid(child, 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)  # noqa: T201


if __name__ == "__main__":
    serve()
