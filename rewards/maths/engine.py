"""The engine: math-verify, with sympy inside. Imported by `rewards.worker` only (it takes half a second).

math-verify's own time-outs are off (they need `signal.alarm`, which fails off the main thread); the worker
pool holds the clock. Its unit list is off too, because it eats variables (`3t` becomes 3); units are
`rewards.maths.compare`'s. An expression that does not parse is said so, and never taken for "different".
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache

from latex2sympy2_extended import NormalizationConfig
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from rewards.maths.compare import Undecided, Verdict, compare, quick_leaf

_CONFIG = [
    LatexExtractionConfig(
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
        )
    ),
    ExprExtractionConfig(),
]
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
Stage = Callable[[str], None]


def equivalent(gold: str, answer: str, stage: Stage = lambda name: None) -> Verdict:
    """Compare two normalised answers: value (1, 0, or `None` where the gold does not parse) and why.

    `stage` is told "gold" before a gold expression is parsed and "answer" before the answer's turn: who is
    to blame when time or memory runs out.
    """
    return compare(gold, answer, lambda a, b: _leaf(a, b, stage))


def _leaf(gold: str, answer: str, stage: Stage) -> Verdict:
    try:
        return quick_leaf(gold, answer)
    except Undecided:
        pass
    stage("gold")
    wanted = _gold(gold)
    if not wanted:
        return None, "the gold answer does not parse"
    stage("answer")
    found = _parsed(answer)
    if not found:
        return 0.0, "the answer does not parse"
    same = verify(wanted, found, allow_set_relation_comp=True, timeout_seconds=None)
    return float(same), "equal by math-verify" if same else "different by math-verify"


@lru_cache(maxsize=1024)
def _gold(text: str) -> list:
    """The gold, parsed and evaluated once: where even that is too costly, it is the gold that is to blame."""
    wanted = _parsed(text)
    for expression in wanted:
        with suppress(AttributeError, TypeError, ValueError, ArithmeticError, NotImplementedError):
            expression.evalf()
    return wanted


def _parsed(text: str) -> list:
    text = _THOUSANDS.sub("", text)  # in a single expression a comma before three digits separates nothing
    return parse(f"${text}$", _CONFIG, fallback_mode="no_fallback", parsing_timeout=None)
