"""Plots: points where they belong, the same bytes each time, nothing that breaks on odd data."""

from __future__ import annotations

import itertools
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from pipeline.report import plots
from pipeline.report.plots import LIGHT, PLACES, Box, Series, chain_plot, line_plot, number, spread, thin

ROOT = Path(__file__).parents[3]
SVG = "{http://www.w3.org/2000/svg}"


def paths(svg: str, name: str) -> list[list[tuple[float, float]]]:
    """Corner and control points of the paths of a class."""
    groups = [g for g in ET.fromstring(svg).iter(f"{SVG}g") if g.get("class") == name]
    return [
        [(float(x), float(y)) for x, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", p.get("d"))]
        for g in groups
        for p in g.iter(f"{SVG}path")
    ]


def size(svg: str) -> tuple[float, float]:
    _, _, width, height = map(float, ET.fromstring(svg).get("viewBox").split())
    return width, height


def texts(svg: str) -> list[str]:
    return [t.text for t in ET.fromstring(svg).iter(f"{SVG}text")]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.8734, "0.873"), (45000, "45000"), (12.34, "12.3"), (0.0000012, "1.2e-06")],
)
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_long_series_are_averaged_down():
    points = [(float(i), float(i % 2)) for i in range(1000)]
    got = thin(points)
    assert len(got) <= 120 and got[-1][0] == 999
    assert sum(y for _, y in got) / len(got) == pytest.approx(0.5, abs=0.02)
    assert thin(points[:100]) == points[:100]


def test_points_lie_where_their_values_say_and_the_axes_are_named():
    svg = line_plot("t", "nats", [Series("a", "s1", ((0.0, 0.0), (5.0, 0.5), (10.0, 1.0)))], 0.0, 2.0)
    (((x0, y0), (x1, y1), (x2, y2)),) = paths(svg, "curve")
    width, height = size(svg)
    assert 0 < x0 < x1 < x2 <= width and height >= y0 > y1 > y2 >= 0
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.01) and y0 - y1 == pytest.approx(y1 - y2, abs=0.01)
    assert {"step", "nats", "0.0", "2.0", "0", "10"} <= set(texts(svg)), "axes reach low, high and the steps"
    assert texts(svg)[-1] == "1", "the last value beside its curve"


@pytest.mark.parametrize(
    "points",
    [((3.0, 0.5),), ((1.0, 2.0), (2.0, 2.0)), ((1.0, math.nan), (2.0, 1.0)), ((0.0, -1e9), (1e6, 1e9))],
)
def test_odd_data_makes_a_plot_all_the_same(points):
    svg = line_plot('a < "b"', "x & y", [Series('"<&', "s1", points)])
    assert ET.fromstring(svg).get("aria-label") == 'a < "b"' and "x & y" in texts(svg)
    (curve,) = paths(svg, "curve")
    width, height = size(svg)
    assert curve and all(0 <= x <= width and 0 <= y <= height for x, y in curve)


def test_nothing_to_plot_is_nothing():
    assert line_plot("t", "u", []) == ""
    assert line_plot("t", "u", [Series("a", "s1", ((1.0, math.inf),))]) == ""


def test_labels_keep_apart_and_in_order():
    got = spread([0.5, 0.48, 0.51, 1.0], 0.13)
    assert [sorted(got).index(y) for y in got] == [1, 0, 2, 3]
    assert all(b - a >= 0.13 - 1e-12 for a, b in itertools.pairwise(sorted(got))) and got[3] == 1.0
    assert got[1] == 0.48, "the lowest stays"


MAKE = """
from pipeline.report.plots import Box, Series, chain_plot, line_plot
print(line_plot("t", "u", [Series("a", "s1", ((0.0, 0.0), (5.0, 0.5)))]))
print(chain_plot([Box("zero", "R1-Zero", (("zero", 0.5),), "")], [], True))
"""


def test_the_same_data_gives_the_same_bytes_in_every_process():
    def made(seed: str) -> str:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", MAKE]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout

    assert made("1") == made("2") != ""


def test_every_colour_is_a_variable_of_the_page_in_light_and_dark():
    box = Box("zero", "R1-Zero", (("zero", 0.5),), "")
    series = [Series(s, s, ((0.0, 0.0), (5.0, 0.5))) for s in ("s0", "s8")]
    svg = line_plot("t", "u", series) + chain_plot([box], [], False)
    assert not re.search(r"#[0-9a-f]{6}", svg) and len(set(LIGHT.values())) == len(LIGHT)
    used = set(re.findall(r"var\(--(\w+)\)", svg))
    assert {"s0", "s8", "ink", "soft", "faint", "card", "accent"} == used
    page = (Path(plots.__file__).parent / "base.html.j2").read_text(encoding="utf-8")
    dark = page[page.index("prefers-color-scheme: dark") :]
    assert all(f"--{name}: #" in dark for name in LIGHT)


def test_plots_of_one_page_do_not_share_ids():
    series = [Series("a", "s1", ((0.0, 0.0), (5.0, 0.5)))]
    ids = [set(re.findall(r'\bid="([^"]+)"', line_plot(t, "u", series))) for t in "ab"]
    assert ids[0] and not ids[0] & ids[1]


@pytest.mark.parametrize("upright", [False, True])
def test_the_chain_fits_its_picture(upright):
    boxes = [
        Box(s, "<title>", (("m", 0.5),) if s != "distill" else (("a", None), ("student_b", 0.1)), "")
        for s in [*PLACES, "elsewhere"]
    ]
    svg = chain_plot(boxes, [("pretrain", "sft2"), ("zero", "sft"), ("pretrain", "elsewhere")], upright)
    width, height = size(svg)
    assert (height > width) == upright
    corners = paths(svg, "box")
    assert len(corners) == 9 + 2 * 8, "nine boxes; a bar and its track in those with one model"
    big = [c for c in corners if max(x for x, _ in c) - min(x for x, _ in c) > 80
           and max(y for _, y in c) - min(y for _, y in c) > 40]  # fmt: skip
    assert len({min(c) for c in big}) == 9
    edges = paths(svg, "edge")
    assert len(edges) == 2 * 2, "a line and its head each"
    for x, y in itertools.chain(*corners, *edges):
        assert 0 <= x <= width and 0 <= y <= height
    assert texts(svg).count("<title>") == 9 and "b" in texts(svg), "the label is shortened"
    assert "10.0 %" in texts(svg) and "–" in texts(svg)


def test_a_chain_without_a_stage_is_nothing():
    assert chain_plot([], [], upright=True) == ""
