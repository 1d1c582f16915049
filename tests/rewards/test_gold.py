"""Reference answers are checked when they are loaded: what cannot be verified is named, with the reason."""

from rewards.maths.gold import check_golds

GOOD = [
    "41", "-0.5", "\\frac{3}{8}", "\\{2, 7\\}", "(1, 2]", "[2, 3]", "x^2 + 3x", "Beatrice", "\\text{even}",
    "C", "\\text{None}", "no solution", "y = 4x", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "12:30",
    "5 \\text{ kg}", "n \\ge 3", "\\frac\\pi9", "\\frac{1+a+c}c", "\\frac{3}{8} E_{2}", "4 \\text{ a.m.}",
    "0.0101_{2}", "2:7:\\ldots", "\\frac{2}{9}\\triangle PQR", "-7./3", "8.1e5",
]  # fmt: skip
BAD = [
    "", "  ", "None", "null", "nan", "proof", "Proof.", "prove it", "notfound", "not found", "n/a", "N/A",
    "{'value': 3, 'unit': 'cm'}", "{}", "[]", "['3', '4']", "see the solution", "\\frac{3}{", "$\\sqrt{$",
    "answer", "[answer]", "unknown",
]  # fmt: skip


def test_golds_that_can_be_verified():
    assert dict(zip(GOOD, check_golds(GOOD), strict=True)) == dict.fromkeys(GOOD, "")


def test_golds_that_cannot_are_named():
    assert [gold for gold, reason in zip(BAD, check_golds(BAD), strict=True) if not reason] == []


def test_one_reason_for_each_in_order():
    reasons = check_golds(["7", "proof", "7", "", "7"])
    assert [bool(reason) for reason in reasons] == [False, True, False, True, False]
    assert check_golds([]) == []
