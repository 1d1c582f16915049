r"""Equations and inequalities as answers.

x = 3       answers 3, and 3 answers x = 3; where an equation is expected, it or its right-hand side counts,
            and that only where the left one is a name or made of points: AB/CD = 2
chains      `a = b \approx c` is one answer where it is true: the last member, or the one it is rounded from
relations   are the same where the gaps between their sides are, but for a constant factor
"""

import re
from itertools import pairwise

from rewards.maths.single import UNREAD, WORD, Verdict, same_value
from rewards.maths.values.evaluate import TooExpensive, exact, proportional, value
from rewards.maths.values.expression import Tree, names, parse
from rewards.maths.values.numbers import Number, plain_number, rounds_to

EQUALS = re.compile(r"(?<![<>!:])=|\\approx(?![A-Za-z])|\\equiv(?![A-Za-z])")
NAME = re.compile(r"\s*(?:[A-Za-z]|\\[a-zA-Z]+)(?:_\w|_\s*\{[^{}]*\}|'|\([a-zA-Z0-9, ]*\))*\s*")
FLIPPED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}
_RELATION = re.compile(r"\\(?:le|ge|ne|approx|equiv)(?![A-Za-z])|[<>=]")
_SAME_SIGN = {"\\approx": "=", "\\equiv": "="}
_MODULUS = re.compile(r"\(?\s*\\?(?:p|b)?mod\s*(?:\{\s*(\w+)\s*\}|(\w+))\s*\)?\s*$")
_NUMERAL = re.compile(r"-?[\d.,/]+")


def is_quantity(left: str) -> bool:
    """Whether an equation's left side is what is asked for: a name, words, or made of points, `AB/CD`."""
    bare = re.sub(r"\\[A-Za-z]+", "", left)
    points = bool(re.search(r"[A-Z]", bare)) and not re.search(r"[a-z]", bare)
    return points or ":" in left or bool(NAME.fullmatch(left)) or bool(WORD.search(bare))


def same_relation(gold: str, answer: str) -> Verdict | None:
    """The verdict on two relations with as many sides; `None` where neither is one."""
    signs = [[_SAME_SIGN.get(sign, sign) for sign in _RELATION.findall(text)] for text in (gold, answer)]
    if not signs[0] or not signs[1]:
        return (0.0, "a relation against a value") if signs[0] or signs[1] else None
    sides = [[parse(side.strip()) for side in _RELATION.split(text)] for text in (gold, answer)]
    if None in sides[0]:
        return None, UNREAD[0]
    if None in sides[1] or len(signs[0]) != len(signs[1]):
        return 0.0, UNREAD[1]
    gaps: list[list[Tree]] = [[("add", a, ("neg", b)) for a, b in pairwise(trees)] for trees in sides]
    if signs[0] != signs[1]:
        signs[1] = [FLIPPED.get(sign, sign) for sign in signs[1]][::-1]
        gaps[1] = [("neg", gap) for gap in gaps[1]][::-1]
    try:
        same = signs[0] == signs[1] and all(
            proportional(a, b, positive=sign not in ("=", "\\ne"))
            for sign, a, b in zip(signs[0], *gaps, strict=True)
        )
    except TooExpensive as error:
        return 0.0, f"too expensive to evaluate: {error}"
    return float(same), "as relations"


def true_members(chain: str) -> list[str]:
    r"""What `a = b \approx c` answers: its last member, and the one that this is rounded from; none if false.

    Of a congruence that is the residue: it lies below the modulus."""
    modulus = _MODULUS.search(chain)
    parts = [part.strip() for part in EQUALS.split(chain[: modulus.start()] if modulus else chain)]
    if "" in parts[1:]:
        return []
    if len(parts) == 2 and NAME.fullmatch(parts[1]) and not NAME.fullmatch(parts[0]):  # 7 = n
        parts.reverse()
    below = parse(modulus[1] or modulus[2]) if modulus else None
    modulo = exact(below) if below else None
    rounded = False
    for i, (before, after) in enumerate(pairwise(parts)):
        a, b = parse(before), parse(after)
        if a is None or b is None or names(a) or names(b):
            continue
        first, second = exact(a), exact(b)
        if "\\equiv" in chain and first is not None and second is not None:
            true = not modulo or (first - second) % modulo == 0
            true = true and (i + 2 < len(parts) or modulo is None or 0 <= second < modulo)
        else:
            number = plain_number(after)
            rounded = number is not None and _is_rounding(a, number)
            true = rounded or same_value(a, b)
        # `2 * 3 = 2^3 + 3^2 = 17` explains a sign of the problem's own
        if not true and (i > 0 or len(parts) < 3 or _NUMERAL.fullmatch(before)):
            return []
    return [parts[-1], parts[-2]] if rounded else [parts[-1]]


def _is_rounding(tree: Tree, number: Number) -> bool:
    """Whether a number, of two digits at least, is an expression rounded to its last place."""
    if number.digits is None:
        zeros = len(str(number.value)) - len(str(number.value).rstrip("0"))
        number = Number(number.value, -zeros, False, "")
    rational = exact(tree)
    found = value(tree) if rational is None else rational
    return (
        found is not None and not found.imag and found != number.value and rounds_to(found.real, number, 10)
    )
