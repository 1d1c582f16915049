"""Equivalence: tables of what is equal, what is not, and what cannot be decided.

Among them the known mistakes of graders, lenient ones (`(2,\\infty)` for `[2,\\infty)`, `100` for `1`,
several answers for one) and strict ones (`10,\\!080`, mixed numbers, `\\pm`, choices, degrees, units,
ordinals).
"""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from rewards.maths.grade import grade_math, same

EQUAL = [
    ("3", "three"),
    (r"\$32,\!348", r"$\$32,\!348$"),
    (r"\begin{pmatrix} -2 \\ -7 \end{pmatrix}", r"\begin{pmatrix}-2\\-7\end{pmatrix}"),
    (r"[2,\infty)", r"[2,\infty)"),
    (r"[2,\infty)", r"[2, +\infty)"),
    ("1", r"100\%"),
    (r"50\%", "50"),
    (r"50\%", "0.5"),
    (r"10,\!080", "10080"),
    ("10080", "10,080"),
    (r"\text{(C)}", "C"),
    ("(C)", "C"),
    (r"90^\circ", "90"),
    ("90", "90°"),
    ("90", "90 degrees"),
    (r"5\text{ cm}", "5"),
    ("5", "5 cm"),
    (r"15\frac{39}{40}", r"\frac{639}{40}"),
    (r"12^{\mathrm{th}}", "12"),
    ("12", "12th"),
    (r"3\pm2\sqrt2", r"3+2\sqrt{2}, 3-2\sqrt{2}"),
    (r"3+2\sqrt{2}, 3-2\sqrt{2}", r"3 \pm 2\sqrt{2}"),
    ("12", "１２"),
    (r"\frac12", "0.5"),
    (r"\frac{1}{3}", "0.333333"),
    ("x=5", "5"),
    ("5", "x=5"),
    ("1,-2", "-2,1"),
    (r"\{1,2\}", r"\{2,1\}"),
    (r"\sqrt{2}/2", r"\frac{1}{\sqrt{2}}"),
    ("x^2+2x+1", "(x+1)^2"),
    (r"(-\infty,1)\cup(2,3]", r"(-\infty,1)\cup(2,3]"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ("1.5e3", "1500"),
    (r"1.5\times10^3", "1500"),
    (r"\$18", "18"),
    ("18", "$18.00"),
    ("Evelyn", r"\text{Evelyn}"),
    (r"x \in [-2,7]", "[-2,7]"),
    (r"\frac{\pi}{2}", "π/2"),
    (r"-\frac{1}{2}", "-1/2"),
    ("0", "-0"),
    ("1000000", "1,000,000"),
    ("6", r"\frac{12}{2}"),
    ("4", "2+2"),
    (r"\sqrt{4}", "2"),
    (r"\frac{3}{4}", r"\frac{6}{8}"),
    ("(1,2)", "(1.0, 2)"),
    (r"(3, \frac{\pi}{2})", r"(3,\pi/2)"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"\left(3,\frac{\pi}{2}\right)"),
    ("5,-5", r"\pm 5"),
    ("10", "10."),
    ("y=2x+3", "2x+3"),
    ("y=2x+3", "y=2x+3"),
    (r"11\sqrt{2}", r"11\sqrt2"),
    (r"\text{Monday}", "monday"),
    ("6+9i", "9i+6"),
    ("2,3,5", "5,3,2"),
    ("16", r"16\text{ dollars per day}"),
    ("2x+3y=6", "4x+6y=12"),
    ("1<x<2", "(1,2)"),
    ("1:2", "1/2"),
    ("1e400", "x = y = 1e400"),  # more than floating point holds
]
DIFFERENT = [
    ("3", "four"),
    (r"(2,\infty)", r"[2,\infty)"),
    ("1", "100"),
    ("C", "B"),
    ("5 cm", "5 m"),
    ("42", "1, 2, 42"),
    ("42", "42 or 43"),
    ("42", "１２"),
    (r"\frac{1}{3}", "0.33"),
    (r"\frac{1}{3}", "0.33333"),  # five digits; six are taken for a rounded third
    ("(1,-2)", "(-2,1)"),
    (r"\{1,2\}", "(1,2)"),
    (r"(-\infty,1)\cup(2,3]", r"(-\infty,1)\cup(2,3)"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\3\end{pmatrix}"),
    ("even", "odd"),
    (r"2\pi", "6.28"),
    ("1,2", "1, 2 and 3"),
    ("(1,234)", "1234"),
    ("10", "banana"),
    ("2", r"2\text{ and }3"),
    ("1950", r"= 125\times10^{1947}"),  # more than floating point holds
    ("7", "5 = 1e400"),
]


@pytest.mark.parametrize(("gold", "answer"), EQUAL)
def test_equal(gold, answer):
    assert grade_math(gold, answer).value == 1


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_different(gold, answer):
    assert grade_math(gold, answer).value == 0


@pytest.mark.parametrize(
    ("gold", "why"),
    [
        (r"\frac{", "does not parse"),
        ("", "empty"),
        ("5" * 10_001, "longer than 10000"),
        (r"\frac{7}{0}", "too expensive"),
        (r"\sqrt{3} + 9^{9^{9^{9}}}", "too expensive"),
    ],
)
def test_a_gold_that_cannot_be_verified_is_no_verdict(gold, why):
    outcome = grade_math(gold, "5")
    assert outcome.value is None and why in outcome.detail


def test_same_is_for_votes_and_symmetric():
    for group in (
        [r"\frac12", "0.5", "1/2", r"\dfrac{2}{4}"],
        [r"2\sqrt3", r"\sqrt{12}"],
        ["(C)", "C", "C."],
    ):
        assert all(same(a, b) for a in group for b in group)
    assert not same("1/3", "0.333")  # as a reference it would be taken for a rounded one
    assert not same("0.333", "1/3")


def test_works_in_threads():
    """mpmath's contexts are not made for several threads at once."""
    pairs = [(rf"\sqrt{{{n}}} + \pi^{{{n}}}", rf"{n}^{{1/2}} + \pi^{{{n}}}") for n in range(2, 42)]
    with ThreadPoolExecutor(8) as threads:
        assert [o.value for o in threads.map(lambda pair: grade_math(*pair), pairs)] == [1.0] * 40


def test_numbers_cost_microseconds():
    start = time.process_time()
    for i in range(2000):
        assert grade_math("10080", str(i)).value == 0
    assert time.process_time() - start < 2000 * 300e-6  # measured 50 us
