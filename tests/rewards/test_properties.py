"""What must hold for every answer, not only for those somebody thought of (hypothesis makes them up)."""

from __future__ import annotations

import json
from fractions import Fraction

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.tools.grade import grade_file
from rewards.maths.extract import final_answer
from rewards.maths.grade import grade_math
from rewards.maths.notation import normalise
from rewards.maths.values.numbers import plain_number

FAST = settings(max_examples=200, deadline=None, derandomize=True)
SLOW = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

integers = st.integers(-(10**12), 10**12)
decimals = st.builds(
    lambda whole, part, places: f"{whole}.{part % 10**places:0{places}d}",
    st.integers(-(10**6), 10**6), st.integers(0, 10**6), st.integers(1, 6),
)  # fmt: skip
fractions = st.builds(
    lambda sign, top, bottom: f"{sign}\\frac{{{top}}}{{{bottom}}}",
    st.sampled_from(["", "-"]), st.integers(0, 10**4), st.integers(1, 10**4),
)  # fmt: skip
numbers = st.one_of(integers.map(str), decimals, fractions)
terms = st.recursive(
    st.one_of(st.integers(1, 99).map(str), st.sampled_from(["x", "n", "\\pi"])),
    lambda inner: st.one_of(
        st.builds("({} + {})".format, inner, inner),
        st.builds("({} - {})".format, inner, inner),
        st.builds("\\frac{{{}}}{{{}}}".format, inner, inner),
        st.builds("\\sqrt{{{}}}".format, inner),
        st.builds("{}^{{{}}}".format, st.sampled_from(["x", "n", "2"]), st.integers(2, 5).map(str)),
    ),
    max_leaves=5,
)
plain = st.one_of(numbers, st.lists(integers.map(str), min_size=2, max_size=5).map(", ".join))


def value(text: str) -> Fraction:
    number = plain_number(normalise(text))
    assert number is not None
    return number.value


@FAST
@given(st.one_of(plain, terms, st.text(max_size=60)))
def test_an_answer_equals_itself(gold):
    if not gold.strip():
        assert grade_math(gold, gold).value is None
    elif normalise(gold):
        assert grade_math(gold, gold).value == 1


@FAST
@given(numbers, numbers)
def test_numbers_are_right_and_symmetric(first, second):
    """Against exact fractions; where a decimal is not the other's rounding, equality is equality."""
    forward, back = grade_math(first, second), grade_math(second, first)
    assert forward is not None and back is not None and forward.value == back.value
    if value(first) == value(second):
        assert forward.value == 1
    elif "." not in first + second:
        assert forward.value == 0


@SLOW
@given(first=terms, second=terms)
def test_expressions_are_symmetric(first, second):
    forward, back = (grade_math(a, b).value for a, b in ((first, second), (second, first)))
    if None not in (forward, back):
        assert forward == back


@FAST
@given(integers, st.integers(1, 10**9), st.sampled_from([1, -1]))
def test_a_perturbed_number_is_never_correct(number, by, sign):
    gold, other = str(number), str(number + sign * by)
    assert grade_math(gold, other).value == 0
    assert grade_math(f"\\frac{{{gold}}}{{7}}", f"\\frac{{{other}}}{{7}}").value == 0
    assert grade_math(f"{gold}\\text{{ cm}}", f"{other} cm").value == 0
    assert grade_math(f"({gold}, 2)", f"({other}, 2)").value == 0
    assert grade_math(gold, f"{gold}, {other}").value == 0
    assert grade_math(gold, f"{gold} or {other}").value == 0


@FAST
@given(numbers, st.integers(1, 9), st.integers(0, 30))
def test_a_changed_digit_is_never_correct(gold, by, place):
    at = [i for i, character in enumerate(gold) if character.isdigit()]
    i = at[place % len(at)]
    other = gold[:i] + str((int(gold[i]) + by) % 10) + gold[i + 1 :]
    if "{0}" in other and "frac" in other and other.endswith("{0}"):
        return  # a zero below the line
    if value(gold) != value(other) and len(at) < 7:
        assert grade_math(gold, other).value == 0


def same(gold: str, answer: str) -> bool:
    outcome = grade_math(gold, answer)
    return outcome is not None and outcome.value == 1


@FAST
@given(plain)
def test_spacing_and_delimiters_do_not_matter(gold):
    for answer in (
        f" {gold}\n", f"${gold}$", f"$ {gold} $", f"\\({gold}\\)", f"\\[ {gold} \\]", f"$${gold}$$", f"**{gold}**",  # noqa: E501
        f"{gold}.", gold.replace("\\frac", "\\dfrac"), gold.replace("\\frac", "\\tfrac"),
        gold.replace(", ", " ,\\; "),
    ):  # fmt: skip
        assert same(gold, answer), answer
    pair = f"({gold}, 1)"
    assert same(pair, pair.replace("(", "\\left(").replace(")", "\\right)"))


@FAST
@given(
    numbers,
    st.sampled_from(["We add up. ", "First 17 + 4 = 21.\n\n", "<think>\n\\boxed{3} or 5?\n</think>\n", "由题意，"]),  # noqa: E501
    st.sampled_from([
        "The answer is ${}$.", "The final answer is ${}$. I hope it is correct.", "**Answer:** {}",
        "Thus $\\boxed{{{}}}$.", "So we get $x = \\boxed{{{}}}$ as wanted by 12 people.", "#### {}",
        "<answer>{}</answer>", "所以答案是${}$。", "Final Answer: {}", "### Answer\n\n${}$", "Therefore, $x = {}$.",  # noqa: E501
    ]),
)  # fmt: skip
def test_surrounding_prose_does_not_matter(gold, before, template):
    completion = before + template.format(gold)
    answer = final_answer(completion, "lenient")
    assert answer is not None and same(gold, answer), (completion, answer)


@FAST
@given(st.text(alphabet=st.characters(codec=None), max_size=300), st.sampled_from(["strict", "lenient"]))
def test_extraction_never_raises(text, mode):
    answer = final_answer(text, mode)
    assert answer is None or isinstance(answer, str)


PIECES = st.sampled_from(
    "\\boxed{ } { $ $$ \\( \\) \\[ <think> </think> <answer> </answer> #### answer is Answer: 5 -3 x = , . \n \\ "  # noqa: E501, SIM905
    "\\frac 1/0 ** 答案是 \x00 \ud800 ^ _ \\pm [2,\\infty) or and % \\text{ = ( ) !".split(" ")
)


@FAST
@given(st.lists(PIECES, max_size=40).map(" ".join), st.lists(PIECES, max_size=6).map(" ".join))
def test_no_input_raises(text, gold):
    for mode in ("strict", "lenient"):
        answer = final_answer(text, mode)
        if answer is not None and gold.strip():
            outcome = grade_math(gold, answer)
            assert outcome is None or outcome.value in (None, 0.0, 1.0)


def test_lines_of_any_kind_are_answered(tmp_path):
    """Every line in, one line out, in order, whatever it holds."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"

    @settings(max_examples=1, derandomize=True, deadline=None)
    @given(st.lists(st.one_of(st.binary(max_size=40), st.text(max_size=40).map(str.encode)), min_size=300))
    def check(lines):
        lines = [line.replace(b"\n", b"") for line in lines]
        lines += [
            json.dumps({"answer": "5", "completion": text.decode("utf-8", "replace")}).encode()
            for text in lines
        ]
        source.write_bytes(b"\n".join([*lines, b""]))
        grade_file(source, out)
        rows = [json.loads(line) for line in out.read_bytes().splitlines()]
        assert len(rows) == len(lines)
        assert all(row["verdict"] in ("correct", "incorrect", "error") for row in rows)

    check()
