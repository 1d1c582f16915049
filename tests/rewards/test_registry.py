"""Rewards by name: what is refused, in one line, and what a failing function of a user's does."""

import math

import pytest

from rewards.registry import REWARDS, find
from rewards.reward import Outcome, Scorer, check_weights
from rewards.style import soft_overlong
from rollout.types import Problem, Prompt, Rollout

MATH = Problem("m", "math", "3+4?", answer="7")
RIGHT = "<think>\nadd them\n</think>\n<answer>7</answer>"
OWN = '''
"""A user's rewards."""
from rewards.reward import Outcome
LIMIT = 3
def brevity(problem, completion):
    """mean of 1 / (1 + characters)

    The rest of the docstring is not for the glossary.
    """
    return 1 / (1 + len(completion))
def cut(problem, completion, rollout): return float(rollout.finish_reason == "length")
def raises(problem, completion): return 1 / 0
def nan(problem, completion): return float("nan")
def nothing(problem, completion): return None
def text(problem, completion): return "1.0"
def outcome(problem, completion): return Outcome(None, "the checker is down")
def truth(problem, completion): return True
def three(problem, completion, tokens): return 0.0
def one(completion): return 0.0
def format(problem, completion): return 0.0
'''


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    """A module `own_rewards` in the working directory, which is not on the path."""
    (tmp_path / "own_rewards.py").write_text(OWN)
    (tmp_path / "own_broken.py").write_text("def f(problem, completion)\n    return 0.0\n")
    (tmp_path / "own_leaves.py").write_text("raise SystemExit(0)\n")
    (tmp_path / "own_needs.py").write_text("import no_such_thing\n")
    monkeypatch.chdir(tmp_path)


def rollout(tokens: int = 2, finish_reason: str = "stop", **fields) -> Rollout:
    return Rollout(Prompt(MATH, "r1", ()), 0, 0, (1,) * tokens, (0.0,) * tokens, finish_reason, **fields)


@pytest.mark.parametrize(
    ("name", "reported"),
    [
        ("acuracy", "no reward 'acuracy'; did you mean accuracy?"),
        ("zzz", "Registered: accuracy, environment, format, language, overlong, repetition; "),
        ("no_such_module:f", "no file no_such_module.py in "),
        ("own_broken:f", "module own_broken cannot be imported: SyntaxError"),
        ("own_leaves:f", "module own_leaves cannot be imported: SystemExit"),
        ("own_needs:f", "module own_needs cannot be imported: ModuleNotFoundError: No module named 'no_such"),
        (":f", "cannot be imported"),
        ("own_rewards:brevty", "no function 'brevty'; did you mean own_rewards:brevity?"),
        ("own_rewards:LIMIT", "no function 'LIMIT'"),
        ("own_rewards:three", "takes (problem, completion, tokens); expected (problem, completion) or "),
        ("own_rewards:one", "takes (completion); expected"),
        ("own_rewards:format", "has the name of another reward, format"),
    ],
)
def test_a_name_that_does_not_fit_is_refused_in_one_line(name, reported):
    with pytest.raises(ValueError) as refused:
        check_weights({"accuracy": 1.0, name: 0.5})
    assert reported in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("weight", [math.nan, math.inf, "0.5", None, True])
def test_a_weight_is_a_finite_number(weight):
    with pytest.raises(ValueError, match="weight of reward 'own_rewards:brevity' must be a finite number"):
        check_weights({"own_rewards:brevity": weight})
    check_weights({"own_rewards:brevity": -1, "format": 0})


def test_each_registered_reward_is_explained_and_gives_an_outcome():
    assert {*REWARDS} == {"accuracy", "format", "language", "repetition", "overlong", "environment"}
    for name, entry in REWARDS.items():
        assert find(name) is entry and entry.name == name
        assert entry.summary and "\n" not in entry.summary
        assert isinstance(entry(MATH, RIGHT, rollout(max_tokens=8)), Outcome)


def test_a_users_own_reward_is_a_part_of_the_sum():
    weights = {"accuracy": 1.0, "own_rewards:brevity": 2.0, "own_rewards:cut": -0.5, "own_rewards:truth": 0.0}
    with Scorer(weights) as scorer:
        full, cut = scorer.grade_all([(rollout(), RIGHT), (rollout(finish_reason="length"), RIGHT)])
        assert scorer.glossary()["reward/brevity"] == "mean of 1 / (1 + characters)"
        assert scorer.glossary()["reward/cut"] == "mean of own_rewards:cut, which has no docstring"
    short = 1 / (1 + len(RIGHT))
    assert list(full.parts) == ["accuracy", "format", "language", "repetition", "brevity", "cut", "truth"]
    assert full.parts["brevity"] == short and full.parts["cut"] == 0 and full.parts["truth"] == 1
    assert full.reward == pytest.approx(1 + 2 * short) and cut.reward == pytest.approx(0.5 + 2 * short)
    assert full.verdict == cut.verdict == "correct"


@pytest.mark.parametrize(
    ("function", "why"),
    [
        ("raises", "raises raised ZeroDivisionError: division by zero"),
        ("nan", "nan returned nan, which is no finite number"),
        ("nothing", "a reward returns a number or an Outcome, not None"),
        ("text", "not '1.0'"),
        ("outcome", "the checker is down"),
    ],
)
def test_a_function_that_fails_is_a_verifier_failure_and_no_zero(function, why):
    with Scorer({"accuracy": 1.0, f"own_rewards:{function}": 1.0}) as scorer:
        (graded,) = scorer.grade_all([(rollout(), RIGHT)])
    assert graded.verdict == "error" and why in graded.detail and "\n" not in graded.detail
    assert function not in graded.parts and graded.parts["accuracy"] == 1


def test_overlong_is_one_of_the_rewards():
    lengths = range(1, 11)
    pairs = [(rollout(n, max_tokens=10), RIGHT) for n in lengths]
    with Scorer({"accuracy": 1.0, "overlong": 0.5}, overlong_buffer=4) as scorer:
        graded = scorer.grade_all(pairs)
        (unknown,) = scorer.grade_all([(rollout(), RIGHT)])
    for n, g in zip(lengths, graded, strict=True):
        assert g.parts["overlong"] == soft_overlong(n, 10, 4) and g.reward == 1 + 0.5 * g.parts["overlong"]
    assert [g.parts["overlong"] for g in graded][5:] == [0, -0.25, -0.5, -0.75, -1]
    assert unknown.verdict == "error" and "max_tokens" in unknown.detail
    with Scorer({"accuracy": 1.0}) as plain:
        assert "overlong" not in plain.grade(rollout(), RIGHT).parts
