"""Our own labelled set: answers and completions with the verdicts they deserve, each with its reason."""

import random

import pytest

from pipeline.errors import UserError
from rewards.maths.extract import final_answer
from rewards.maths.grade import grade_math
from tests import data
from tests.rewards import answers, completions

FILES = "math500 aime24 aime25 amc23 olympiadbench minerva_math gsm8k_test math_test math_train".split()  # noqa: SIM905


def right(gold: str, completion: str) -> tuple[bool, str]:
    answer = final_answer(completion, "lenient")
    if answer is None:
        return False, "no answer"
    outcome = grade_math(gold, answer)
    assert outcome.value is not None, (gold, answer, outcome.detail)
    return outcome.value == 1, f"{answer!r}: {outcome.detail}"


def test_the_set_is_large_and_has_both_kinds():
    both = answers.cases() + completions.cases()
    assert len({(gold, text) for _, gold, text, _ in both}) >= 400
    assert sum(not want for *_, want in both) >= 100


@pytest.mark.parametrize("reason", answers.CLASSES)
def test_answers(reason):
    wrong = []
    for gold, answer, want in answers.CLASSES[reason]:
        outcome = grade_math(gold, answer)
        if outcome.value != float(want):
            wrong.append((gold, answer, want, outcome.detail))
    assert not wrong


@pytest.mark.parametrize("reason", completions.CLASSES)
def test_completions(reason):
    wrong = []
    for gold, text, want in completions.CLASSES[reason]:
        got, why = right(gold, text)
        if got != want:
            wrong.append((gold, text[:200], want, why))
    assert not wrong


def rows(name: str, most: int = 150) -> list[dict]:
    try:
        every = data.rows(name)
    except UserError as missing:
        pytest.skip(str(missing))
    return random.Random(0).sample(every, most) if len(every) > most else every


@pytest.mark.parametrize("name", FILES)
def test_gold_answers_themselves(name):
    """Gold against itself, boxed in a sentence, and (where solutions end in one) against its solution."""
    wrong = []
    for row in rows(name):
        gold = row["answer"]
        if grade_math(gold, gold).value != 1:
            wrong.append(("itself", gold))
        if not right(gold, f"We add up.\n\nSo we get $\\boxed{{{gold}}}$, as wanted.")[0]:
            wrong.append(("boxed", gold))
        if row["solution"] and name.startswith(("math", "gsm8k")) and not row.get("several_boxes"):
            got, why = right(gold, row["solution"])
            if not got and row["id"] not in ODD_SOLUTIONS:
                wrong.append((row["id"], gold, why))
    assert not wrong


# Their boxes hold two notations of a time of day, and words.
ODD_SOLUTIONS = {"train/number_theory/837.json", "train/prealgebra/1393.json"}


@pytest.mark.parametrize("name", ["math500", "gsm8k_test", "aime24", "amc23"])
def test_other_values_are_not_the_gold(name):
    """Each gold against another row's; where that is judged correct the two must have the same numbers."""
    every = rows(name)
    for row, other in zip(every, every[1:] + every[:1], strict=True):
        outcome = grade_math(row["answer"], other["answer"])
        assert outcome.value is not None
        if outcome.value == 1:
            assert answers.alike(row["answer"], other["answer"]), (row["answer"], other["answer"])
