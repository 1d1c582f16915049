"""Scores of a benchmark from graded samples, and how sure they are. Pure functions.

`pass@1` is the mean over questions of the share of samples that are right (avg@k, arXiv:2501.12948,
Sec. 3), `pass@j` the unbiased estimate from k >= j samples (arXiv:2107.03374, Eq. 1), `cons@k` the
accuracy of the majority answer (arXiv:2203.11171). A sample whose verifier failed counts as not right,
and the failures are counted beside it, so the true score lies at most that much higher.

The 95 % interval is over questions, and over their families where rows have `labels` with a `family`
(`pipeline.evaluation.intervals`).

Format is R1's think/answer format whatever the template: under `boxed`, which does not ask for it, a
low rate is no fault.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from pipeline.evaluation.intervals import families, interval, variance
from rewards.maths.grade import first_equal


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


def mean_of(values: Sequence[float]) -> float | None:
    """The mean, `None` of nothing."""
    return sum(values) / len(values) if values else None


def percent(share: float | None) -> str:
    """`0.873` -> `87.3 %`; `None` -> a dash."""
    return "–" if share is None else f"{100 * share:.1f} %"


def families_of(rows: Sequence[dict[str, Any]]) -> list[str] | None:
    """The family of each question, by one row of each: its own where it has none; `None` where none has."""
    labels = [row.get("labels") for row in rows]
    found = [of.get("family") if isinstance(of, dict) else None for of in labels]
    if not any(found):
        return None
    return [f"family {name}" if name else f"question {i}" for i, name in enumerate(found)]


def rounds(k: int) -> list[int]:
    """The j of pass@j that are reported for k samples: the powers of two, and k."""
    return sorted({2**i for i in range(k.bit_length()) if 2**i <= k} | {k})


def scores(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All scores of one benchmark, as in scores.json, from the rows of generations.jsonl.

    Returns:
        `pass@1`, `interval`, `interval_method`, `stderr` (cluster-robust, `None` of one question), `n`
        questions, `k` samples each; `pass@j` by powers of two; `pass@k` and `cons@k` at j = k (`cons@k` over
        the mathematics, `None` without any); `format_rate`,
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
    of = families_of([group[0] for group in by_question.values()])
    bounds, method = interval(means, k, of)
    error = math.sqrt(variance(families(means, of)))
    ballots = [v for v, g in zip(marked, by_question.values(), strict=True) if g[0]["kind"] != "code"]
    sampled = [row for row in rows if row["finish_reason"] is not None]
    return {
        "pass@1": sum(means) / len(means),
        "interval": list(bounds),
        "interval_method": method,
        "stderr": error if math.isfinite(error) else None,
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
