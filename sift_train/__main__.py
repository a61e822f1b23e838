"""``python -m sift_train --config run.yaml``: trains as a YAML file says."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

_INTERRUPTED = 130  # the exit code that shells use after Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m sift_train",
        description="Train a sparse set of a model's weights as a YAML file says, and write the delta.",
        epilog="Example: python -m sift_train --config run.yaml",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the YAML file")
    parser.add_argument(
        "--resume", action="store_true", help="resume from the newest checkpoint in run_dir"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing outputs")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    given = parser.parse_args(arguments)
    if sys.stderr.isatty():
        print("loading torch and transformers …", file=sys.stderr, flush=True)  # noqa: T201
    try:
        return _run(given)
    except KeyboardInterrupt:  # before the first step, or the second one
        print("interrupted", file=sys.stderr)  # noqa: T201
        return _INTERRUPTED


def _run(given: argparse.Namespace) -> int:
    from sift_train.run_file import run_file  # takes seconds
    from sparsedelta import SparseDeltaError

    try:
        result = run_file(
            given.config,
            resume=given.resume,
            overwrite=given.overwrite,
            progress=True,
        )
    except (IndexError, OSError, RuntimeError, TypeError, ValueError, SparseDeltaError) as error:
        if given.debug:
            raise
        notes = getattr(error, "__notes__", [])  # such as the step
        print("\n".join([f"error: {error}", *notes]), file=sys.stderr)  # noqa: T201
        return 1
    for evaluation in result.evaluations:
        values = ", ".join(f"{name} {value:.4f}" for name, value in evaluation.values.items())
        print(f"step {evaluation.step}: {values}")  # noqa: T201
    is_last = result.kept_step == result.n_steps
    kept = "" if is_last else f"; it has the weights after step {result.kept_step}, the best"
    print(  # noqa: T201
        f"{result.delta}: {result.delta_bytes:,} bytes, {result.n_trained:,} of {result.n_total:,} components"
        f" trained in {result.n_steps} step{'s' * (result.n_steps != 1)} ({result.stopped}){kept}"
    )
    return _INTERRUPTED if result.stopped == "interrupted" else 0


if __name__ == "__main__":
    sys.exit(main())
