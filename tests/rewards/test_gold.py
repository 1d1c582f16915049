"""Reference answers are checked when they are loaded: what cannot be verified is named, with the reason."""

import pytest

from rewards.maths.gold import check_golds
from rewards.pool import WorkerPool

GOOD = [
    "41", "-0.5", "\\frac{3}{8}", "\\{2, 7\\}", "(1, 2]", "[2, 3]", "x^2 + 3x", "Beatrice", "\\text{even}",
    "C", "\\text{None}", "no solution", "y = 4x", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "12:30",
    "5 \\text{ kg}", "n \\ge 3",
]  # fmt: skip
BAD = [
    "", "  ", "None", "null", "nan", "proof", "Proof.", "prove it", "notfound", "not found", "n/a", "N/A",
    "{'value': 3, 'unit': 'cm'}", "{}", "[]", "['3', '4']", "see the solution", "\\frac{3}{", "$\\sqrt{$",
    "answer", "[answer]", "unknown",
]  # fmt: skip


@pytest.fixture(scope="module")
def pool():
    with WorkerPool(1) as pool:
        yield pool


def test_golds_that_can_be_verified(pool):
    assert dict(zip(GOOD, check_golds(GOOD, pool=pool), strict=True)) == dict.fromkeys(GOOD, "")


def test_golds_that_cannot_are_named(pool):
    assert [gold for gold, reason in zip(BAD, check_golds(BAD, pool=pool), strict=True) if not reason] == []


def test_one_reason_for_each_in_order(pool):
    reasons = check_golds(["7", "proof", "7", "", "7"], pool=pool)
    assert [bool(reason) for reason in reasons] == [False, True, False, True, False]
    assert check_golds([]) == []
