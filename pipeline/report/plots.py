"""The plots of the report, by matplotlib: metrics over the step, and the chain of stages.

A plot is SVG that stands in the page. Its text is text, in the page's font, and its colours are the page's
CSS variables, so it follows the page into dark mode. The same data makes the same bytes.
"""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator

from pipeline.evaluation.scores import percent
from pipeline.report.template import LIGHT

POINTS = 120
"""Longest series that is plotted point by point; a longer one is averaged down to at most this."""

NAMES = {color: name for name, color in LIGHT.items()}

STYLE: Any = {
    "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"], "font.size": 8, "text.color": LIGHT["ink"],
    "axes.labelcolor": LIGHT["soft"], "axes.edgecolor": LIGHT["faint"], "axes.spines.top": False,
    "axes.spines.right": False, "axes.spines.left": False, "axes.grid": True, "axes.grid.axis": "y",
    "axes.xmargin": 0, "axes.ymargin": 0, "axes.autolimit_mode": "round_numbers",
    "axes.formatter.limits": (-3, 4), "grid.color": LIGHT["faint"], "ytick.major.size": 0,
    "xtick.color": LIGHT["faint"], "ytick.color": LIGHT["faint"], "xtick.labelcolor": LIGHT["soft"],
    "ytick.labelcolor": LIGHT["soft"],
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Series:
    """A curve of a plot."""

    label: str
    color: str
    """A name in `LIGHT`."""
    points: tuple[tuple[float, float], ...]
    """Step and value."""


@dataclass(frozen=True, slots=True)
class Box:
    """A stage in the plot of the chain."""

    stage: str
    title: str
    values: tuple[tuple[str, float | None], ...]
    """Label and held-out accuracy of each model that the stage makes."""
    note: str
    """Text for a stage that makes no model."""


def svg_of(figure: Figure, title: str) -> Markup:
    """A figure as an `<svg>` element; `title` is for screen readers, and makes its inner ids its own."""
    out = io.StringIO()
    bare = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": title}):
        figure.savefig(out, format="svg", transparent=True, metadata=bare)
    svg = out.getvalue()
    svg = re.sub(r"<defs>\s*<style.*?</defs>\s*", "", svg[svg.index("<svg") :], count=1, flags=re.DOTALL)
    svg = re.sub(r"#[0-9a-f]{6}\b", lambda m: f"var(--{NAMES[m[0]]})" if m[0] in NAMES else m[0], svg)
    svg = svg.replace('<g id="', '<g class="')  # ids would recur in the page's other plots
    label = f'<svg role="img" aria-label="{escape(title)}" stroke-linejoin="round"'
    return Markup(label + svg.removeprefix("<svg"))


def number(value: float) -> str:
    """Few digits: `0.873`, `12.3`, `45000`."""
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `POINTS` points: the means of neighbours."""
    size = math.ceil(len(points) / POINTS) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def line_plot(
    title: str, unit: str, series: Sequence[Series], low: float | None = None, high: float | None = None
) -> Markup:
    """Series over the step, the last value of each beside its end; empty without a finite point. `title` is
    for screen readers; the value axis shows at least `low` and `high`."""
    curves = [(s, thin([p for p in s.points if math.isfinite(p[1])])) for s in series]
    curves = [(s, points) for s, points in curves if points]
    if not curves:
        return Markup("")
    steps = [x for _, points in curves for x, _ in points]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.6, 2.2), layout="constrained")
        axes = figure.subplots()
        for s, points in curves:
            color = LIGHT[s.color]
            axes.plot(*zip(*points, strict=True), color=color, clip_on=False, gid="curve")
            axes.plot(*points[-1], "o", color=color, markersize=3.5, clip_on=False)
        axes.update_datalim([(steps[0], v) for v in (low, high) if v is not None])
        axes.autoscale_view(scalex=False)
        axes.set_xlim(min(0.0, *steps), max(*steps, min(steps) + 1))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        bottom, top = axes.get_ylim()
        ends = [(points[-1][1] - bottom) / (top - bottom) for _, points in curves]
        for (s, points), at in zip(curves, spread(ends, 0.09), strict=True):
            text = axes.annotate(number(points[-1][1]), (1, at), (6, 0), "axes fraction", "offset points")
            text.set(color=LIGHT[s.color], fontweight="bold", verticalalignment="center")
        return svg_of(figure, title)


def spread(heights: Sequence[float], apart: float) -> list[float]:
    """The heights of labels, raised where needed to stand `apart` from the one below."""
    placed, lowest = list(heights), -math.inf
    for i in sorted(range(len(heights)), key=heights.__getitem__):
        placed[i] = lowest = max(heights[i], lowest + apart)
    return placed


PLACES = {
    "pretrain": (0, 1), "zero": (1, 0), "sft": (2, 1), "grpo": (3, 1), "reject": (4, 1), "sft2": (5, 1),
    "grpo2": (6, 1), "distill": (5, 0), "student": (3, 0),
}  # fmt: skip
"""Each stage's place along the chain and across it, in boxes."""
WIDTH, HEIGHT, GAP = 1.42, 0.86, 0.3
"""Of a box and between boxes, inches."""


def chain_plot(boxes: Sequence[Box], edges: Sequence[tuple[str, str]], upright: bool) -> Markup:
    """The chain of stages with the held-out accuracy of the models that they make; empty without a stage.
    `boxes` without a place in `PLACES` are left out; `edges` are a stage and one that uses its output;
    `upright`: top to bottom, for a narrow screen."""
    shown = {box.stage: box for box in boxes if box.stage in PLACES}
    if not shown:
        return Markup("")
    length, breadth = (HEIGHT, WIDTH) if upright else (WIDTH, HEIGHT)  # of a box, along and across

    def start(stage: str) -> tuple[float, float]:
        along, across = PLACES[stage]
        return 0.05 + along * (length + GAP), 0.05 + across * (breadth + GAP)

    ends = [start(stage) for stage in shown]
    along, across = max(a for a, _ in ends) + length + 0.05, max(b for _, b in ends) + breadth + 0.5
    width, height = (across, along) if upright else (along, across)

    def place(along: float, across: float) -> tuple[float, float]:
        return (across, height - along) if upright else (along, height - across)

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
        axes.set_axis_off()
        for (a, b), (c, d) in (map(start, edge) for edge in edges if shown.keys() >= set(edge)):
            if b == d and c - a > 2 * (length + GAP):  # around the boxes between
                a, b, c, d = a + length / 2, b + breadth, c + length / 2, d + breadth
                points = [(a, b), (a, b + 0.45), (c, d + 0.45), (c, d)]
            else:
                a, b, d = a + length, b + breadth / 2, d + breadth / 2
                bend = min(c - a, 0.5)
                points = [(a, b), (a + bend, b), (c - bend, d), (c, d)]
            path = Path([place(*p) for p in points], [Path.MOVETO, *[Path.CURVE4] * 3])
            how: Any = {"arrowstyle": "-|>", "mutation_scale": 7, "color": LIGHT["soft"], "gid": "edge"}
            axes.add_patch(FancyArrowPatch(path=path, **how))
        for stage, box in shown.items():
            x, y = place(*start(stage))
            plot_box(axes, box, x, y - HEIGHT)
        return svg_of(figure, f"the chain of stages, {'top to bottom' if upright else 'left to right'}")


def plot_box(axes: Axes, box: Box, x: float, y: float) -> None:
    """A box with its lower left corner at x, y: stage, model, accuracy as number and bar."""

    def rectangle(width: float, height: float, x: float, y: float, color: str, edge: str = "none") -> None:
        style = f"round,pad=0,rounding_size={min(0.1, height / 2, width / 2)}"
        axes.add_patch(FancyBboxPatch((x, y), width, height, style, fc=LIGHT[color], ec=edge, gid="box"))

    left, right, soft = x + 0.12, x + WIDTH - 0.12, LIGHT["soft"]
    rectangle(WIDTH, HEIGHT, x, y, "card", LIGHT["faint"])
    axes.text(left, y + 0.64, box.stage, size=8.5, weight="bold")
    if box.values or box.note:
        axes.text(right, y + 0.64, box.title, ha="right", color=soft)
    if not box.values:
        axes.text(left, y + 0.34, box.note, color=soft)
    elif len(box.values) == 1:
        value = box.values[0][1]
        axes.text(left, y + 0.32, percent(value), size=14, weight="bold")
        rectangle(right - left, 0.07, left, y + 0.14, "faint")
        if value:
            rectangle(value * (right - left), 0.07, left, y + 0.14, "accent")
    else:
        for (label, value), at in zip(box.values, (0.38, 0.16), strict=False):
            axes.text(left, y + at, label.removeprefix("student_"), color=soft)
            axes.text(right, y + at, percent(value), weight="bold", ha="right")
