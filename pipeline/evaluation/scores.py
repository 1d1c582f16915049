"""Scores of a benchmark from graded samples, and how sure they are. Pure functions.

`pass@1` is the mean over questions of the share of samples that are right (avg@k, arXiv:2501.12948,
Sec. 3), `pass@j` the unbiased estimate from k >= j samples (arXiv:2107.03374, Eq. 1), `cons@k` the
accuracy of the majority answer (arXiv:2203.11171). A sample whose verifier failed counts as not right,
and the failures are counted beside it, so the true score lies at most that much higher.

The 95 % interval is over questions, whose choice more samples do not average out. One sample a
question, greedy or not, gives 0 or 1: Wilson's interval. Several give a mean a question: the normal
interval over those means; where they do not differ at all that would have no width, so Wilson again.

Format is R1's think/answer format whatever the template: under `boxed`, which does not ask for it, a
low rate is no fault.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rewards.maths.grade import first_equal

Z95 = 1.959964
"""The normal distribution's 97.5 % point."""


def pass_at(k: int, n: int, c: int) -> float:
    """Chance that k of n samples, taken without replacement, hold one of the c right ones.
    Raises `ValueError`: k is not in 1..n or c not in 0..n."""
    if not 1 <= k <= n or not 0 <= c <= n:
        raise ValueError(f"pass_at(k={k}, n={n}, c={c}) needs 1 <= k <= n and 0 <= c <= n.")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority(votes: Sequence[tuple[str | None, bool]]) -> float:
    """Accuracy of the most frequent answer of one question, 1 or 0; on a tie the share of the tied answers
    that are right, a random pick's mean. `votes` is each sample's answer and whether it is right; without an
    answer it does not vote. `0.5` and `1/2` are one answer."""
    answers = first_equal([answer for answer, _ in votes])
    counts = Counter(answer for answer in answers if answer is not None)
    if not counts:
        return 0.0
    right = {answer for answer, (_, correct) in zip(answers, votes, strict=True) if correct}
    most = max(counts.values())
    tied = [answer for answer, count in counts.items() if count == most]
    return sum(answer in right for answer in tied) / len(tied)


def wilson(right: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, `right` of `n`."""
    if n == 0:
        return 0.0, 1.0
    p, zz = right / n, Z95 * Z95
    centre, spread = p + zz / (2 * n), Z95 * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    low, high = (centre - spread) / (1 + zz / n), (centre + spread) / (1 + zz / n)
    # The bounds hold p; at 0 and n of n they touch it, and rounding must not push them past.
    return max(0.0, min(p, low)), min(1.0, max(p, high))


def interval(means: Sequence[float], samples: int) -> tuple[tuple[float, float], str]:
    """95 % interval of the mean of each question's share of right samples; `wilson` or `normal`, as above."""
    n = len(means)
    mean = sum(means) / n
    variance = sum((m - mean) ** 2 for m in means) / (n - 1) if n > 1 else 0.0
    if samples == 1 or variance < 1e-12:
        return wilson(sum(means), n), "wilson"
    half = Z95 * math.sqrt(variance / n)
    return (max(0.0, mean - half), min(1.0, mean + half)), "normal"


def mean_of(values: Sequence[float]) -> float | None:
    """The mean, `None` of nothing."""
    return sum(values) / len(values) if values else None


def percent(share: float | None) -> str:
    """`0.873` -> `87.3 %`; `None` -> a dash."""
    return "–" if share is None else f"{100 * share:.1f} %"


def rounds(k: int) -> list[int]:
    """The j of pass@j that are reported for k samples: the powers of two, and k."""
    return sorted({2**i for i in range(k.bit_length()) if 2**i <= k} | {k})


def scores(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All scores of one benchmark, as in scores.json, from the rows of generations.jsonl.

    Returns:
        `pass@1`, `interval`, `interval_method`, `n` questions, `k` samples each; `pass@j` by powers of two;
        `pass@k` and `cons@k` at j = k (`cons@k` over the mathematics, `None` without any); `format_rate`,
        `language_consistency`, `mean_tokens`, `truncation_rate` over the sampled completions;
        `verifier_failures` and `prompts_too_long` (not sampled) as counts of samples and questions.

    Raises:
        ValueError: no samples, or not equally many for each question.
    """
    by_question: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        by_question.setdefault(row["index"], []).append(row)
    sizes = {len(group) for group in by_question.values()}
    if len(sizes) != 1:
        raise ValueError(f"every question needs equally many samples, at least one; found {sorted(sizes)}.")
    k = sizes.pop()
    marked = [[(r["extracted"] or None, r["verdict"] == "correct") for r in g] for g in by_question.values()]
    right = [sum(correct for _, correct in group) for group in marked]
    means = [c / k for c in right]
    bounds, method = interval(means, k)
    ballots = [v for v, g in zip(marked, by_question.values(), strict=True) if g[0]["kind"] != "code"]
    sampled = [row for row in rows if row["finish_reason"] is not None]
    return {
        "pass@1": sum(means) / len(means),
        "interval": list(bounds),
        "interval_method": method,
        "n": len(means),
        "k": k,
        **{f"pass@{j}": sum(pass_at(j, k, c) for c in right) / len(right) for j in rounds(k) if j > 1},
        "pass@k": sum(pass_at(k, k, c) for c in right) / len(right),
        "cons@k": mean_of(list(map(majority, ballots))),
        "format_rate": mean_of([row["parts"].get("format", 0.0) for row in sampled]),
        "language_consistency": mean_of([row["parts"].get("language", 1.0) for row in sampled]),
        "mean_tokens": mean_of([row["tokens"] for row in sampled]),
        "truncation_rate": mean_of([row["finish_reason"] == "length" for row in sampled]),
        "verifier_failures": sum(row["verdict"] == "error" for row in rows),
        "prompts_too_long": sum(group[0]["finish_reason"] is None for group in by_question.values()),
    }
