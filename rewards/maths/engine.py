"""The engine: math-verify, with sympy inside, for sums, products, integrals and limits. Called in a worker only.

math-verify's own time-outs are off (they need `signal.alarm`, which fails off the main thread); the worker
pool holds the clock. It drops what it does not know, so it is given nothing with a command that it does not.
An expression that does not parse is reported, and never counts as "different".
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from functools import cache, lru_cache
from types import ModuleType

from rewards.maths.compare import Undecided, Verdict, compare, engine_reads, quick_leaf

Stage = Callable[[str], None]


@cache
def _math_verify() -> tuple[ModuleType, list]:
    """math-verify and how it parses, imported by the first comparison: a worker that runs programs, and the
    programs forked from it, do without sympy (half a second, 60 MB)."""
    import math_verify
    from latex2sympy2_extended import NormalizationConfig

    logging.disable(logging.WARNING)  # math-verify warns that its own time-outs are off; the pool has one
    normalization = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
    )
    latex = math_verify.LatexExtractionConfig(normalization_config=normalization)
    return math_verify, [latex]


def load() -> None:
    """Import math-verify, and compare once: it builds its regexes and parser tables at its first use."""
    _math_verify()[0].verify(_parsed("\\frac{1}{2}"), _parsed("0.5 x"), timeout_seconds=None)


def equivalent(gold: str, answer: str, stage: Stage = lambda name: None) -> Verdict:
    """`compare`, down to math-verify.

    `stage` is called with "gold" before a gold expression is parsed and with "answer" before the answer is:
    which of them is at fault when time or memory runs out.
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
        return 0.0, "the answer is no expression that is understood completely"
    same = _math_verify()[0].verify(wanted, found, timeout_seconds=None)
    return float(same), "equal by math-verify" if same else "different by math-verify"


@lru_cache(maxsize=1024)
def _gold(text: str) -> list:
    """The gold, parsed and evaluated once: where even that is too expensive, the gold is at fault."""
    wanted = _parsed(text)
    for expression in wanted:
        with suppress(AttributeError, TypeError, ValueError, ArithmeticError, NotImplementedError):
            expression.evalf()
    return wanted


def _parsed(text: str) -> list:
    if not engine_reads(text):
        return []
    module, config = _math_verify()
    return module.parse(f"${text}$", config, fallback_mode="no_fallback", parsing_timeout=None)
