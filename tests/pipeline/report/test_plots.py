"""Charts: round ticks, points where they belong, nothing that breaks on odd data."""

from __future__ import annotations

import itertools
import math
import random
import re
import xml.etree.ElementTree as ET

import pytest

from pipeline.report.plots import (
    HEIGHT,
    WIDTH,
    Box,
    Series,
    chain,
    end_labels,
    line_chart,
    number,
    thin,
    ticks,
)


def test_ticks_are_round_cover_the_range_and_are_few():
    rng = random.Random(0)
    for _ in range(500):
        low = rng.uniform(-1, 1) * 10 ** rng.randint(-6, 5)
        high = low + 10 ** rng.uniform(-6, 5)
        got = ticks(low, high)
        step = got[1] - got[0]
        assert got[0] <= low + 1e-6 * step and got[-1] >= high - 1e-6 * step and 2 <= len(got) <= 7
        lead = step / 10 ** math.floor(math.log10(step) + 1e-9)
        assert min(abs(lead - m) for m in (1, 2, 2.5, 5, 10)) < 1e-3
    assert ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1] and ticks(0, 0) == pytest.approx([0, 0.25, 0.5, 0.75, 1])


@pytest.mark.parametrize(
    ("value", "says"), [(0, "0"), (0.8734, "0.873"), (45000, "45000"), (12.34, "12.3"), (0.0000012, "1e-06")]
)
def test_numbers_are_short(value, says):
    assert number(value) == says


def test_long_series_are_averaged_down():
    points = [(float(i), float(i % 2)) for i in range(1000)]
    got = thin(points)
    assert len(got) <= 120 and got[-1][0] == 999
    assert sum(y for _, y in got) / len(got) == pytest.approx(0.5, abs=0.02)
    assert thin(points[:100]) == points[:100]


def test_points_lie_where_their_values_say():
    svg = line_chart("t", [Series("a", "red", ((0.0, 0.0), (5.0, 0.5), (10.0, 1.0)))], 0.0, 1.0)
    (line,) = ET.fromstring(svg).iter("polyline")
    (x0, y0), (x1, y1), (x2, y2) = (map(float, p.split(",")) for p in line.get("points").split())
    assert x0 < x1 < x2 <= WIDTH and HEIGHT >= y0 > y1 > y2 >= 0
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    titles = [t.text for t in ET.fromstring(svg).iter("title")]
    assert "a, step 5: 0.5" in titles


@pytest.mark.parametrize(
    "points",
    [((3.0, 0.5),), ((1.0, 2.0), (2.0, 2.0)), ((1.0, math.nan), (2.0, 1.0)), ((0.0, -1e9), (1e6, 1e9))],
)
def test_odd_data_makes_a_chart_all_the_same(points):
    svg = line_chart("a < b", [Series('"<&', "var(--s1)", points)])
    root = ET.fromstring(svg)
    assert root.get("aria-label") == "a < b"
    numbers = re.findall(r' (?:x|y|cx|cy|x1|y1)="([^"]+)"', svg)
    assert numbers and all(math.isfinite(float(n)) for n in numbers)


def test_nothing_to_draw_is_nothing():
    assert line_chart("t", []) == "" and line_chart("t", [Series("a", "red", ((1.0, math.inf),))]) == ""


def test_end_labels_keep_apart():
    s = Series("a", "red", ())
    ys = [y for y, *_ in end_labels([(50.0, s, "1"), (48.0, s, "2"), (51.0, s, "3"), (100.0, s, "4")])]
    assert all(b - a >= 13 for a, b in itertools.pairwise(ys)) and ys[-1] == 100


@pytest.mark.parametrize("upright", [False, True])
def test_the_chain_fits_its_picture(upright):
    stages = ["pretrain", "zero", "sft", "grpo", "reject", "sft2", "grpo2", "distill", "elsewhere"]
    boxes = [
        Box(s, "<title>", (("m", 0.5),) if s != "distill" else (("a", None), ("student_b", 0.1)), "")
        for s in stages
    ]
    svg = chain(boxes, [("pretrain", "sft2"), ("zero", "sft"), ("pretrain", "elsewhere")], upright)
    root = ET.fromstring(svg)
    _, _, width, height = map(float, root.get("viewBox").split())
    assert (height > width) == upright
    groups = list(root.iter("g"))
    assert len(groups) == 8
    spots = []
    for g in groups:
        x, y = map(float, re.findall(r"[\d.]+", g.get("transform")))
        box = next(g.iter("rect"))
        assert x + float(box.get("width")) <= width and y + float(box.get("height")) <= height
        spots.append((x, y))
    assert len(set(spots)) == 8
    paths = [p.get("d") for p in root.iter("path")]
    assert len(paths) == 2
    for path in paths:
        for x, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", path):
            assert 0 <= float(x) <= width and 0 <= float(y) <= height
    assert "b10.0 %" in "".join(root.itertext()), "the label is shortened"
