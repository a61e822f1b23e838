"""The losses of a training as a picture in SVG."""

from __future__ import annotations

from collections.abc import Sequence

WIDTH, HEIGHT, LEFT, BOTTOM, MARGIN = 720, 240, 56, 34, 12


def curve(points: Sequence[tuple[int, float]]) -> str:
    """Return the curve through (step, loss) pairs, at least two, as an ``svg`` element."""
    steps, losses = [step for step, _ in points], [loss for _, loss in points]
    low, high = min(*losses, 0.0), max(losses)
    begin, end = min(steps), max(steps)

    def x(step: float) -> float:
        return LEFT + (step - begin) / max(end - begin, 1) * (WIDTH - LEFT - MARGIN)

    def y(loss: float) -> float:
        return MARGIN + (high - loss) / ((high - low) or 1.0) * (HEIGHT - BOTTOM - MARGIN)

    path = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in points)
    lines = []
    for number in range(5):
        value = low + (high - low) * number / 4
        lines.append(
            f'<line class="axis" x1="{LEFT}" x2="{WIDTH - MARGIN}" y1="{y(value):.1f}" '
            f'y2="{y(value):.1f}"/><text x="{LEFT - 8}" y="{y(value) + 4:.1f}" '
            f'text-anchor="end">{value:.3g}</text>'
        )
    below = HEIGHT - BOTTOM + 18
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" '
        f'aria-label="loss by step">{"".join(lines)}'
        f'<text x="{LEFT}" y="{below}">{begin:,}</text>'
        f'<text x="{WIDTH - MARGIN}" y="{below}" text-anchor="end">step {end:,}</text>'
        f'<polyline class="curve" points="{path}"/></svg>'
    )
