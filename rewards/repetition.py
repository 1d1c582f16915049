"""Repetition: the share of a completion that says again, word for word, what it said before.

Rewards that look at the answer alone leave a policy free to go round in circles; several open
reproductions of R1 punish repeated n-grams for that. It is counted over words, single Han characters, numbers
and signs, so that it means the same in both languages and in mathematics.
"""

from __future__ import annotations

import re

N = 8
"""Length of an n-gram. Worked arithmetic repeats shorter runs for good reason (`= 12`, `Then`, `so x`)."""

_TOKEN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|[^\\W\\d_]+|\\d+|[^\\w\\s]|_")


def repetition(completion: str, n: int = N) -> float:
    """Share of the n-grams that occurred before, 0 .. 1; 0 for a completion of less than n + 1 words."""
    tokens = [match[0].lower() for match in _TOKEN.finditer(completion)]
    grams = list(zip(*(tokens[start:] for start in range(n)), strict=False))
    return (len(grams) - len(set(grams))) / len(grams) if grams else 0.0
