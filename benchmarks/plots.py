"""Draws the measurements of ``against.py`` and ``scaling.py`` as SVG.

    python benchmarks/plots.py

``bars.svg``, the picture of the README, shows the files of five tools. The other plots show size by density, size by
time, and time and memory by checkpoint size; all log-log.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

RESULTS = Path(__file__).resolve().parent / "results"
OWN = "sparsedelta"
OWN_COLOURS = ("#d62728", "#ff7f0e", "#f7b6d2", "#8c564b")
COLOURS = ("#1f77b4", "#2ca02c", "#17becf", "#9467bd", "#bcbd22", "#7f7f7f", "#393b79")
MARKERS = "svDP<>X*ph^"
UNIFORM = "uniform-bf16-"
BAR_PAIRS = {
    "small-step-1": "one training step, 2.3 % changed",
    "full": "fine-tuning all weights, 25 % changed",
}
BAR_TOOLS = {
    "sparsedelta": "sparsedelta",
    "z4ai model_delta": "z4ai",
    "fireworks (zstd of XOR)": "XOR and zstd (Fireworks)",
    "grail layout": "grail",
    "TRL v2 layout": "TRL v2",
}

Measured = Mapping[str, Any]


def read_lines(path: Path) -> list[Measured]:
    """Return the objects in a file of JSON lines; none if there is no file."""
    return (
        [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
    )


def style_of(tool: str, number: int) -> dict[str, Any]:
    """Return the style of a tool's line; sparsedelta is in front, in warm colours."""
    if tool.startswith(OWN):
        colour = OWN_COLOURS[number % len(OWN_COLOURS)]
        return {"color": colour, "marker": "o", "zorder": 3, "linewidth": 2}
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    return {"color": colour, "marker": marker, "linewidth": 1}


def draw_bars(axes: Axes, measured: Measured) -> None:
    """Draw the size of the file that each tool writes for one pair, the smallest first."""
    sizes = {BAR_TOOLS[tool]: measured["tools"][tool]["bytes"] / 1e6 for tool in BAR_TOOLS}
    names = sorted(sizes, key=lambda name: -sizes[name])
    colours = [OWN_COLOURS[0] if name == OWN else "#9aa5b1" for name in names]
    bars = axes.barh(names, [sizes[name] for name in names], color=colours)
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set_title(BAR_PAIRS[measured["pair"]], fontsize=11)
    axes.set_xlabel(f"MB of delta for {measured['bytes'] / 1e6:.0f} MB of model")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.15)


def draw_series(axes: Axes, record: Sequence[Measured]) -> None:
    """Draw bytes per change over density, for positions drawn at random in one bf16 tensor."""
    uniform = [m for m in record if m["pair"].startswith(UNIFORM)]
    density = [m["nnz"] / m["numel"] for m in uniform]
    for number, tool in enumerate(tools_of(uniform)):
        size = [m["tools"].get(tool, {}).get("bytes", float("nan")) / m["nnz"] for m in uniform]
        axes.plot(density, size, label=tool, markersize=4, **style_of(tool, number))
    least = [(m["uniform_bits"] + m["value_bits"]) / 8 / m["nnz"] for m in uniform]
    axes.plot(density, least, "k--", linewidth=1, label="entropy of positions and values")
    label(axes, "share of elements changed", "bytes per changed element")
    axes.set_title("Positions at random, bf16")


def draw_trained(axes: Axes, record: Sequence[Measured]) -> None:
    """Draw bytes per change for every pair made by training."""
    trained = [m for m in record if not m["pair"].startswith(("uniform", "large"))]
    for number, tool in enumerate(tools_of(trained)):
        size = [m["tools"].get(tool, {}).get("bytes", float("nan")) / m["nnz"] for m in trained]
        style = style_of(tool, number) | {"linestyle": "none"}
        axes.plot([m["pair"] for m in trained], size, markersize=5, label=tool, **style)
    axes.set_yscale("log")
    axes.set_ylabel("bytes per changed element")
    axes.tick_params("x", rotation=60)
    axes.grid(visible=True, which="both", alpha=0.2)
    axes.set_title("Changes made by training")


def draw_speed(axes: Axes, measured: Measured, way: str) -> None:
    """Draw bytes per change by the speed of writing or applying, one point per tool."""
    for number, (tool, found) in enumerate(measured["tools"].items()):
        if "problem" not in found:
            speed = measured["bytes"] / 1e6 / found[way]["cpu_seconds"]
            style = style_of(tool, number) | {"linestyle": "none"}
            axes.plot([speed], [found["bytes"] / measured["nnz"]], label=tool, **style)
    label(axes, f"{way}: MB of target per CPU second", "bytes per changed element")
    axes.set_title(f"{measured['pair']}, {measured['bytes'] / 1e6:,.0f} MB, one core")


def draw_scaling(axes: Axes, rows: Sequence[Measured], key: str, unit: str) -> None:
    """Draw the time and memory of each command by the size of the checkpoint."""
    for name in dict.fromkeys(row["what"] for row in rows):
        own = [row for row in rows if row["what"] == name]
        axes.plot([row["gb"] for row in own], [row[key] for row in own], "o-", label=name)
    label(axes, "GB of the base", unit)


def below(figure: Any, axes: Axes) -> None:
    """Add a legend below all plots."""
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8
    )


def label(axes: Axes, x: str, y: str) -> None:
    """Name both axes and make them logarithmic."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(visible=True, which="both", alpha=0.2)


def tools_of(record: Iterable[Measured]) -> list[str]:
    """Return the tools in a record, in order."""
    return list(dict.fromkeys(tool for m in record for tool in m["tools"]))


def main() -> None:
    """Make every plot for which there are measurements."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    results = parser.parse_args().results
    plt.rcParams["svg.hashsalt"] = "sparsedelta"  # the same numbers give the same file
    record = read_lines(results / "against.jsonl")
    scaling = read_lines(results / "scaling.jsonl")
    if record:
        figure, axes = plt.subplots(1, 2, figsize=(10, 2.6), layout="constrained")
        for axis, pair in zip(axes, BAR_PAIRS, strict=True):
            draw_bars(axis, next(m for m in record if m["pair"] == pair))
        figure.patch.set_facecolor("white")  # readable on a dark page as well
        write(figure, results / "bars.svg")
        figure, axes = plt.subplots(1, 2, figsize=(13, 6), layout="constrained")
        draw_series(axes[0], record)
        draw_trained(axes[1], record)
        below(figure, axes[0])
        write(figure, results / "size.svg")
        figure, axes = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
        largest = max(record, key=lambda m: int(m["bytes"]))
        draw_speed(axes[0], largest, "write")
        draw_speed(axes[1], largest, "apply")
        below(figure, axes[0])
        write(figure, results / "speed.svg")
    if scaling:
        figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
        draw_scaling(axes[0], scaling, "seconds", "seconds")
        draw_scaling(axes[1], [r for r in scaling if r["peak_mb"]], "peak_mb", "peak memory, MB")
        axes[0].legend(fontsize=8)
        write(figure, results / "scaling.svg")


def write(figure: Any, path: Path) -> None:
    """Save a figure without its date."""
    figure.savefig(path, metadata={"Date": None})
    print(f"written to {path}")


if __name__ == "__main__":
    main()
