"""Small charts as SVG, made from numbers alone: they are written again every two seconds while a run trains.

Matplotlib takes 100 ms for a figure, on a machine whose cores train; these take microseconds and follow the page's
colours, dark or light.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 320, 170
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 26
MOST_POINTS = 400
"""A line with more points looks the same with every n-th."""
LEAST_SPAN = 0.05
"""The length of a y axis relative to its values, at least: or noise looks like a collapse."""

Points = tuple[Sequence[float], Sequence[float]]
"""x and y of the points of one line."""


def line_chart(
    title: str,
    lines: Mapping[str, Points],
    x_name: str = "step",
    x_end: float = 0,
    least: float = 0,
    reference: tuple[str, float] | None = None,
) -> str:
    """Lines over steps from 0 on, with the last value of each in the caption.

    Args:
        lines: by name; values that are not finite are left out.
        x_end: where the x axis ends, if no line goes on. least: the length of the y axis, at least.
        reference: the name and the y of a dashed line, to compare the others with.
    """
    finite = {name: _finite(*points) for name, points in lines.items()}
    finite = {name: points for name, points in finite.items() if points}
    last = ", ".join(
        f"{f'{name} ' if len(finite) > 1 else ''}{number(points[-1][1])}" for name, points in finite.items()
    )
    caption = f"{title}: {last}" if last else f"{title}: nothing yet"
    if not finite:
        return _figure(caption, "")
    xs, ys = zip(*(point for points in finite.values() for point in points))
    if reference is not None and math.isfinite(reference[1]):
        ys, caption = (*ys, reference[1]), f"{caption} (dashed: {reference[0]} {number(reference[1])})"
    least = max(least, LEAST_SPAN * max(map(abs, ys)))
    frame = _Frame(_range((0, x_end, *xs), 0), _range(ys, 0.04, least))
    parts = [frame.axes(x_name)]
    if reference is not None and math.isfinite(reference[1]):
        parts.append(f'<path class="axis dashed" d="M{LEFT},{frame.y(reference[1]):.1f} H{WIDTH - RIGHT}"/>')
    for index, points in enumerate(finite.values()):
        every = max(1, len(points) // MOST_POINTS)
        shown = [*points[::every], points[-1]]
        path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in shown)
        parts.append(f'<polyline class="line line-{index}" points="{path}"/>')
        x, y = points[-1]
        parts.append(f'<circle class="dot dot-{index}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3"/>')
    return _figure(caption, "".join(parts))


def scatter_chart(
    title: str,
    points: Mapping[str, tuple[float, float]],
    x_name: str,
    y_name: str,
    limit: tuple[str, float] | None = None,
) -> str:
    """Named points.

    Args:
        limit: the name and the x of a dashed vertical line, for what has no y.
    """
    finite = {name: point for name, point in points.items() if all(map(math.isfinite, point))}
    if not finite:
        return _figure(f"{title}: nothing yet", "")
    inside = [] if limit is None else [(limit[1], next(iter(finite.values()))[1])]
    frame = _Frame(*(_range(values, 0.12) for values in zip(*finite.values(), *inside)))
    parts = [frame.axes(x_name, y_name)]
    if limit is not None:
        at_x, bottom = frame.x(limit[1]), HEIGHT - BOTTOM
        anchor, shift = ("end", -5) if at_x > WIDTH * 0.6 else ("start", 5)
        parts.append(
            f'<path class="axis dashed" d="M{at_x:.1f},{TOP} V{bottom}"/><text x="{at_x + shift:.1f}" '
            f'y="{bottom - 6}" text-anchor="{anchor}">{escape(limit[0])}</text>'
        )
    for index, (name, (x, y)) in enumerate(finite.items()):
        at_x, at_y = frame.x(x), frame.y(y)
        anchor = "end" if at_x > WIDTH * 0.6 else "start"
        shift = -7 if anchor == "end" else 7
        short = name if len(name) <= 24 else name[:23] + "…"
        parts.append(f'<circle class="dot dot-{index % 6}" cx="{at_x:.1f}" cy="{at_y:.1f}" r="4"/>')
        parts.append(f'<text x="{at_x + shift:.1f}" y="{at_y + 4:.1f}" text-anchor="{anchor}">{escape(short)}</text>')
    named = "; ".join(f"{name} {number(x)}, {number(y)}" for name, (x, y) in finite.items())
    named += f"; {limit[0]} {number(limit[1])}" if limit is not None else ""
    return _figure(title, "".join(parts), f"{x_name} and {y_name}: {named}")


class _Frame:
    """The part of the chart that the values fill."""

    def __init__(self, x_range: tuple[float, float], y_range: tuple[float, float]):
        self.x_low, self.x_high = x_range
        self.y_low, self.y_high = y_range

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)

    def axes(self, x_name: str, y_name: str = "") -> str:
        bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
        wide, high = self.x_high - self.x_low, self.y_high - self.y_low
        ends = [
            f'<text x="{LEFT - 5}" y="{bottom}" text-anchor="end">{number(self.y_low, high)}</text>',
            f'<text x="{LEFT - 5}" y="{TOP + 8}" text-anchor="end">{number(self.y_high, high)}</text>',
            f'<text x="{LEFT}" y="{HEIGHT - 10}">{number(self.x_low, wide)}</text>',
            f'<text x="{right}" y="{HEIGHT - 10}" text-anchor="end">{number(self.x_high, wide)}</text>',
            f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 10}" text-anchor="middle">{escape(x_name)}</text>',
        ]
        if y_name:
            middle = (TOP + bottom) / 2
            ends.append(
                f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">'
                f"{escape(y_name)}</text>"
            )
        return f'<path class="axis" d="M{LEFT},{TOP} V{bottom} H{right}"/>' + "".join(ends)


def _finite(xs: Sequence[float], ys: Sequence[float]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in zip(xs, ys) if math.isfinite(x) and math.isfinite(y)]


def _range(values: Sequence[float], margin: float, least: float = 0) -> tuple[float, float]:
    """The ends of an axis: the values with a margin, around their middle if that is shorter than ``least``."""
    low, high = min(values), max(values)
    if (high - low) * (1 + 2 * margin) < least:
        return (low + high - least) / 2, (low + high + least) / 2
    if low == high:
        return low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    return low - margin * (high - low), high + margin * (high - low)


def number(value: float, span: float = math.inf) -> str:
    """Three significant digits, and as many more as tell apart the ends of an axis of this length."""
    digits = min(max(3, 2 + round(math.log10(max(abs(value), span) / span))), 9) if span < math.inf else 3
    return f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:.0f}"


def _figure(caption: str, inner: str, description: str = "") -> str:
    label = escape(f"{caption}. {description}" if description else caption)
    return (
        f'<figure class="chart"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{inner}</svg>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
