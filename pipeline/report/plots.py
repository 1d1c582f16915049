"""The report's pictures as SVG text: line charts and the chain of stages.

By hand rather than by matplotlib: the colours are the page's own CSS variables, so light and dark come
for free, a chart is a few kilobytes, and hovering a point shows its numbers without a script.

Axes    u along the chain, v across it; drawn left to right on a desk, top to bottom on a phone
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 44, 44, 10, 30
POINTS = 120
"""Longer series are averaged down to so many points: more than a chart of this size can show."""


@dataclass(frozen=True, slots=True)
class Series:
    """A line of a chart."""

    label: str
    color: str
    """CSS colour, mostly `var(--s1)`."""
    points: tuple[tuple[float, float], ...]
    """Step and value."""


@dataclass(frozen=True, slots=True)
class Box:
    """A stage in the picture of the chain."""

    stage: str
    title: str
    values: tuple[tuple[str, float | None], ...]
    """Label and held-out accuracy of each model that the stage makes."""
    note: str
    """What stands there instead, where the stage makes no model."""


PLACES = {
    "pretrain": (0, 1),
    "zero": (1, 0),
    "sft": (2, 1),
    "grpo": (3, 1),
    "reject": (4, 1),
    "sft2": (5, 1),
    "grpo2": (6, 1),
    "distill": (5, 0),
}
"""u and v of every stage, in boxes."""


def number(value: float) -> str:
    """Few digits: `0.873`, `12.3`, `4500`."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.3g}" if abs(value) >= 0.001 else f"{value:.0e}"


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers that span low to high, about so many."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / about
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `POINTS` points: the means of neighbours."""
    size = math.ceil(len(points) / POINTS) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def line_chart(
    title: str, series: Sequence[Series], low: float | None = None, high: float | None = None
) -> Markup:
    """A chart of some series over the step; empty without a point.

    Args:
        title: for screen readers; the page prints its own.
        series: points that are not finite are left out.
        low, high: what the value axis shows at least.
    """
    lines = [(s, thin([p for p in s.points if math.isfinite(p[1])])) for s in series]
    lines = [(s, points) for s, points in lines if points]
    if not lines:
        return Markup("")
    values = [y for _, points in lines for _, y in points]
    values += [v for v in (low, high) if v is not None]
    marks = ticks(min(values), max(values))
    last = max(x for _, points in lines for x, _ in points)
    first = min(0.0, *(x for _, points in lines for x, _ in points))
    steps = [t for t in ticks(first, last) if t <= last] or [first]

    def x_of(x: float) -> float:
        return LEFT + (x - first) / ((last - first) or 1) * (WIDTH - LEFT - RIGHT)

    def y_of(y: float) -> float:
        return HEIGHT - BOTTOM - (y - marks[0]) / ((marks[-1] - marks[0]) or 1) * (HEIGHT - TOP - BOTTOM)

    bottom = HEIGHT - BOTTOM + 15
    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for mark in marks:
        y = y_of(mark)
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(text("tick", LEFT - 6, y + 3.5, number(mark), "end"))
    out += [text("tick", x_of(step), bottom, number(step), "middle") for step in steps]
    out.append(text("tick", (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 2, "step", "middle"))
    for s, points in lines:
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in points)
        out.append(f'<polyline class="curve" points="{path}" style="stroke:{s.color}"/>')
        for x, y in points[:: max(1, len(points) // 30)]:
            out.append(dot("hit", x_of(x), y_of(y), 7, "", f"{s.label}, step {number(x)}: {number(y)}"))
    ends = [(y_of(points[-1][1]), x_of(points[-1][0]), s, number(points[-1][1])) for s, points in lines]
    for y, x, s, _ in ends:
        out.append(dot("end", x, y, 3, s.color, s.label))
    for y, s, value in end_labels([(y, s, value) for y, _, s, value in ends]):
        out.append(text("last", WIDTH - RIGHT + 7, y + 4, value, color=s.color))
    return Markup("".join(out) + "</svg>")


def text(css: str, x: float, y: float, content: str, anchor: str = "start", color: str = "") -> str:
    """An SVG text, escaped."""
    style = f' style="fill:{color}"' if color else ""
    return (
        f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{escape(content)}</text>'
    )


def dot(css: str, x: float, y: float, radius: float, color: str, tip: str) -> str:
    """An SVG circle that says `tip` when the mouse rests on it."""
    style = f' style="fill:{color}"' if color else ""
    at = f'cx="{x:.1f}" cy="{y:.1f}" r="{radius}"'
    return f'<circle class="{css}" {at}{style}><title>{escape(tip)}</title></circle>'


def end_labels(wanted: list[tuple[float, Series, str]]) -> list[tuple[float, Series, str]]:
    """Where the last values stand, in the right margin: at their lines' height, moved apart where needed."""
    placed: list[tuple[float, Series, str]] = []
    for y, s, value in sorted(wanted, key=lambda w: w[0]):
        placed.append((max(y, placed[-1][0] + 13) if placed else y, s, value))
    return placed


def chain(boxes: Sequence[Box], edges: Sequence[tuple[str, str]], upright: bool) -> Markup:
    """The chain of stages with the held-out accuracy of what each makes.

    Args:
        boxes: stages without a place in `PLACES` are left out.
        edges: what is made from what.
        upright: top to bottom, for a narrow screen.
    """
    width, height, gap_u, gap_v = (118, 74, 22, 26) if upright else (128, 76, 25, 30)
    size_u, size_v = (height, width) if upright else (width, height)
    drawn = [box for box in boxes if box.stage in PLACES]

    def start(stage: str) -> tuple[float, float]:
        u, v = PLACES[stage]
        return 3 + u * (size_u + gap_u), 3 + v * (size_v + gap_v)

    def point(u: float, v: float) -> str:
        return f"{v:.1f} {u:.1f}" if upright else f"{u:.1f} {v:.1f}"

    far_u = max(start(b.stage)[0] for b in drawn) + size_u + 3
    far_v = max(start(b.stage)[1] for b in drawn) + size_v + 44
    box_size = (far_v, far_u) if upright else (far_u, far_v)
    out = [
        f'<svg viewBox="0 0 {box_size[0]:.0f} {box_size[1]:.0f}" role="img" aria-label="the chain of stages">'
    ]
    known = {box.stage for box in drawn}
    for before, after in edges:
        if before in known and after in known:
            out.append(f'<path class="edge" d="{edge(start(before), start(after), size_u, size_v, point)}"/>')
            u, v = arrow_at(start(before), start(after), size_u, size_v)
            out.append(
                f'<circle class="tip" r="3" cx="{point(u, v).split()[0]}" cy="{point(u, v).split()[1]}"/>'
            )
    for box in drawn:
        u, v = start(box.stage)
        x, y = (v, u) if upright else (u, v)
        out.append(box_svg(box, x, y, width, height))
    return Markup("".join(out) + "</svg>")


def jumps(a: tuple[float, float], b: tuple[float, float], size_u: float) -> bool:
    """Whether an edge within a row passes over other boxes, and so goes around them."""
    return a[1] == b[1] and b[0] - a[0] > 3.5 * size_u


def arrow_at(
    a: tuple[float, float], b: tuple[float, float], size_u: float, size_v: float
) -> tuple[float, float]:
    """Where the edge from box a to box b ends."""
    return (b[0] + size_u / 2, b[1] + size_v) if jumps(a, b, size_u) else (b[0], b[1] + size_v / 2)


def edge(
    a: tuple[float, float],
    b: tuple[float, float],
    size_u: float,
    size_v: float,
    point: Callable[[float, float], str],
) -> str:
    """The path from box a to box b: straight, or in a curve to another row, or around what is between."""
    end = arrow_at(a, b, size_u, size_v)
    if jumps(a, b, size_u):
        u, v = a[0] + size_u / 2, a[1] + size_v
        side = v + 36
        return f"M {point(u, v)} C {point(u, side)} {point(u, side)} {point(u + 50, side)} " + (
            f"L {point(end[0] - 50, side)} C {point(end[0], side)} {point(end[0], side)} {point(*end)}"
        )
    u, v = a[0] + size_u, a[1] + size_v / 2
    bend = min(end[0] - u, 40)
    return f"M {point(u, v)} C {point(u + bend, v)} {point(end[0] - bend, end[1])} {point(*end)}"


def box_svg(box: Box, x: float, y: float, width: float, height: float) -> str:
    """A box: stage, model, accuracy as number and bar."""
    left, right = 12, width - 12
    out = [f'<g transform="translate({x:.1f} {y:.1f})">']
    out.append(f'<rect class="box" width="{width}" height="{height}" rx="10"/>')
    out.append(text("stage", left, 19, box.stage))
    if box.values or box.note:
        out.append(text("model", right, 19, box.title, "end"))
    if len(box.values) == 1:
        label, value = box.values[0]
        out.append(text("value", left, 44, share(value)) + f"<title>{escape(label)}</title>")
        for css, part in (("track", 1.0), ("bar", value or 0.0)):
            size = f'width="{part * (right - left):.1f}" height="6" rx="3"'
            out.append(f'<rect class="{css}" x="{left}" y="56" {size}/>')
    for i, (label, value) in enumerate(box.values[:2] if len(box.values) > 1 else ()):
        out.append(text("model", left, 43 + 20 * i, label.removeprefix("student_")))
        out.append(text("small", right, 43 + 20 * i, share(value), "end"))
    if not box.values:
        out.append(text("model", left, 44, box.note))
    return "".join(out) + "</g>"


def share(value: float | None) -> str:
    """`0.873` -> `87.3 %`."""
    return "–" if value is None else f"{100 * value:.1f} %"
