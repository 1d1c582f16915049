"""How often 95 % intervals of simulated benchmarks hold the truth (pipeline/evaluation/intervals.py).

A question's chance of success is Beta-distributed around the benchmark's accuracy p: `spread` 0.1 makes
questions that are nearly always or nearly never solved, infinity makes them all alike. Questions of a family
share a Beta-distributed mean. Coverage is a mean over p in (0, 1), a new p for every simulated benchmark; at
the edges it is given for single values of p, of which `worst` is the lowest. In %.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from pipeline.evaluation.intervals import difference_interval, interval

SUMMARY = "coverage of the 95 % intervals, by simulation"
RUNS, RUNS_AT_P = 20_000, 2_000
EDGES = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
SPREADS = (0.1, 1.0, 5.0, math.inf)
FAMILIES = {
    "30 of 5": [5] * 30,
    "100 of 5": [5] * 100,
    "100 of 1 to 13": [1 + 7 * i % 13 for i in range(100)],
}


def beta(rng: np.random.Generator, mean: np.ndarray, spread: float) -> np.ndarray:
    """Chances with this mean, Beta(mean spread, (1 - mean) spread); the mean itself at infinity."""
    if math.isinf(spread):
        return mean
    return rng.beta(np.maximum(mean * spread, 1e-9), np.maximum((1 - mean) * spread, 1e-9))


def benchmarks(
    rng: np.random.Generator, p: np.ndarray, sizes: list[int], k: int, between: float, within: float
) -> np.ndarray:
    """Means over k samples of each question, a row a benchmark (d n): families of these sizes, whose means
    spread by `between` around p (d) and their questions' chances by `within` around those."""
    of_family = beta(rng, np.repeat(p[:, None], len(sizes), 1), between)
    return rng.binomial(k, beta(rng, np.repeat(of_family, sizes, 1), within)) / k


def coverage(
    seed: int, runs: int, p: float | None, k: int, sizes: list[int], between: float, within: float
) -> float:
    """Share of `runs` simulated benchmarks, in %, whose interval holds p; None = a new p for each."""
    rng = np.random.default_rng(seed)
    grouped = len(sizes) != sum(sizes)
    clusters = np.repeat(np.arange(len(sizes)), sizes).tolist() if grouped else None
    held = 0
    for start in range(0, runs, 500):
        truth = rng.random(min(500, runs - start)) if p is None else np.full(min(500, runs - start), p)
        rows = benchmarks(rng, truth, sizes, k, between, within).tolist()
        for row, t in zip(rows, truth.tolist(), strict=True):
            low, high = interval(row, k, clusters)[0]
            held += low <= t + 1e-12 and t - 1e-12 <= high
    return 100 * held / runs


def paired_coverage(seed: int, runs: int, n: int, k: int, alike: float) -> float:
    """The same of `difference_interval`: two models, the second with a new p of its own for each benchmark; a
    share `alike` of the questions has one chance of success for both."""
    rng = np.random.default_rng(seed)
    held = 0
    for _ in range(runs):
        p, q = rng.random(2)
        a, b = beta(rng, np.full(n, p), 1.0), beta(rng, np.full(n, q), 1.0)
        b = np.where(rng.random(n) < alike, a, b)
        truth = (1 - alike) * (q - p)
        low, high = difference_interval(((rng.binomial(k, b) - rng.binomial(k, a)) / k).tolist())
        held += low - 1e-12 <= truth <= high + 1e-12
    return 100 * held / runs


def table(runs: int, runs_at_p: int) -> Iterator[dict[str, Any]]:
    """A row for each kind of benchmark: its mean coverage, and that at each p of the edges."""
    kinds: list[tuple[int, str, list[int], float, float]] = []
    for n in (30, 100, 500):
        kinds.append((1, f"{n} of 1", [1] * n, 1.0, math.inf))
        kinds += [(k, f"{n} of 1", [1] * n, spread, math.inf) for k in (4, 16, 64) for spread in SPREADS]
    kinds += [(k, name, FAMILIES[name], s, 1.0) for k in (1, 4) for name in FAMILIES for s in (1.0, 5.0)]
    for number, (k, name, sizes, between, within) in enumerate(kinds):
        of = (k, sizes, between, within)
        at = {p: coverage(1000 * number + 1 + i, runs_at_p, p, *of) for i, p in enumerate(EDGES)}
        whole = coverage(1000 * number, runs, None, *of)
        spread = "inf" if math.isinf(between) else between
        yield {"families": name, "n": sum(sizes), "k": k, "spread": spread, "mean": whole, "at": at}


def run() -> dict[str, Any]:
    """Coverage of all kinds of benchmarks, and of differences of two models."""
    rows = list(table(RUNS, RUNS_AT_P))
    for row in rows:
        row["worst"] = min(row["at"].values())
    pairs = [
        {"n": n, "k": k, "alike": alike, "mean": paired_coverage(n + k, RUNS // 2, n, k, alike)}
        for n in (30, 100, 500)
        for k in (1, 16)
        for alike in (0.2, 0.8)
    ]
    single = [row for row in rows if row["families"].endswith("of 1")]
    family = [row for row in rows if row not in single]
    claims = []
    for name, some, low, high in (
        ("one or several samples", single, 94.0, 96.0),
        ("questions in families", family, 93.5, 96.5),
        ("difference of two models", pairs, 94.0, 98.0),
    ):
        means = [row["mean"] for row in some]
        claims.append({"claim": f"{name}: lowest mean", "value": min(means), "at_least": low, "unit": "%"})
        claims.append({"claim": f"{name}: highest mean", "value": max(means), "at_most": high, "unit": "%"})
    worst = min(row["worst"] for row in single)
    claims.append(
        {"claim": "one p between 0.01 and 0.5: lowest", "value": worst, "at_least": 91.0, "unit": "%"}
    )
    return {"runs": RUNS, "runs_at_p": RUNS_AT_P, "claims": claims, "rows": rows, "differences": pairs}
