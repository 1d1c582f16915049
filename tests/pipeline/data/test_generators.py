"""The generated problems: right answers, true steps, and splits that cannot overlap."""

import re

import pytest

from pipeline.data.generators import FAMILIES, LARGEST, generate, items, split_of
from pipeline.data.traces import curated, document
from pipeline.errors import UserError
from rewards.style import in_format, language_consistency


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_splits_are_disjoint_by_what_is_computed(family):
    train, heldout = (
        items(family, 400, "train", 0),
        items(family, 100, "heldout", 1),
    )
    assert {i.key for i in train}.isdisjoint(i.key for i in heldout)
    assert all(split_of(i.key) == "heldout" for i in heldout)
    assert len({i.question for i in train}) == len(train)


def test_a_heldout_sum_never_appears_in_another_family():
    heldout = {i.key for i in items("sum", 300, "heldout", 1)}
    told = {i.key for family in ("word", "gym", "sum") for i in items(family, 1500, "train", 0)}
    assert heldout.isdisjoint(told)


@pytest.mark.parametrize("family", ["sum", "word", "gym", "code"])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_steps_lead_from_the_question_to_the_answer(family, split):
    for item in items(family, 150, split, 3):
        assert {eval(step) for step in item.steps} == {eval(item.key)}
        assert item.steps[0] == item.key and item.answer.endswith(item.steps[-1])
        operands = [len(re.findall(r"\d+", step)) for step in item.steps]
        assert operands == list(range(len(item.steps), 0, -1))  # one fewer each line
        first = [int(re.match(r"\d+", step)[0]) for step in item.steps]
        assert all(0 <= value <= LARGEST for value in first)
        numbers = [int(n) for n in re.findall(r"\d+", item.question)]
        assert numbers == [int(n) for n in re.findall(r"\d+", item.key)]


def test_code_answers_pass_their_tests_and_a_wrong_slope_does_not():
    for item in items("code", 120, "train", 0):
        scope: dict = {}
        exec(item.answer, scope)
        for test in item.tests:
            exec(test, scope)
        exec(item.answer.replace("return ", "return 1+"), scope)
        with pytest.raises(AssertionError):
            for test in item.tests:
                exec(test, scope)


def test_same_arguments_same_problems_and_another_seed_others():
    assert generate("tiny", 50, "train", 7) == generate("tiny", 50, "train", 7)
    assert generate("tiny", 50, "train", 7) != generate("tiny", 50, "train", 8)


def test_both_languages_and_all_families_are_there():
    found = generate("all", 600, "train", 0)
    assert {(p.source.partition(":")[2], p.language) for p in found} == {
        (f, lang) for f in FAMILIES for lang in ("en", "zh") if (f, lang) != ("gym", "zh") and f != "tool"
    }


def test_too_many_or_unknown_is_refused():
    with pytest.raises(UserError, match="unknown task 'tinny'"):
        items("tinny", 1, "train", 0)
    with pytest.raises(UserError, match="fewer than 400 different heldout"):
        items("general", 400, "heldout", 0)


def test_curated_traces_are_in_format_and_in_their_language():
    for item in items("all", 200, "train", 5):
        text = curated(item)
        assert in_format(text)
        assert language_consistency(text, item.language, code=item.kind == "code") == 1.0


def test_pretraining_documents_hold_no_heldout_problem():
    import random

    rng = random.Random(0)
    heldout = {i.question for i in items("tiny", 300, "heldout", 1)}
    for item in items("tiny", 500, "train", 0):
        for kind in ("untagged", "bare", "guess", "tagged"):
            text = document(kind, item, rng)
            assert item.question in text and not any(q in text for q in heldout if len(q) > 20)
