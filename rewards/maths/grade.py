"""Whether two mathematical answers are the same: 1, 0, or `None` where the reference cannot be verified.

`notation` gives both one notation, `compare` takes their structure apart by stated rules, and `values`
decides on what is left: single expressions, which are read completely or not at all, and evaluated. No step
can run away, so all of it happens in the trainer's own process; an answer that is too expensive to evaluate
is wrong, a reference answer that is one is the verifier's failure."""

from collections.abc import Sequence
from functools import lru_cache

from rewards.maths.compare import compare
from rewards.maths.extract import last_boxed
from rewards.maths.notation import normalise
from rewards.registry import Outcome

__all__ = ["first_equal", "grade_math", "normalise", "same"]

LONGEST_ANSWER = 2000  # characters; longer ones are not answers
LONGEST_GOLD = 10_000


@lru_cache(maxsize=16384)
def grade_math(gold: str, answer: str) -> Outcome:
    """1 where `answer` equals `gold`, both text or LaTeX, 0 where not, `None`: the verifier failed."""
    if not gold.strip():
        return Outcome(None, "the gold answer is empty", answer)
    if len(gold) > LONGEST_GOLD:
        return Outcome(None, f"the gold answer is longer than {LONGEST_GOLD} characters", answer)
    if len(answer) > LONGEST_ANSWER:
        return Outcome(0.0, f"answer longer than {LONGEST_ANSWER} characters", answer)
    expected, got = (
        normalise((last_boxed(text) or text) if "\\boxed" in text else text) for text in (gold, answer)
    )
    if not got and expected:
        return Outcome(0.0, "empty answer", answer)
    return Outcome(*compare(expected, got), answer)


def same(first: str, second: str) -> bool:
    """Whether two answers are the same whichever of them is the reference."""
    return normalise(first) == normalise(second) or (
        grade_math(first, second).value == 1 == grade_math(second, first).value
    )


def first_equal(answers: Sequence[str | None]) -> list[str | None]:
    """Each answer as the first of them that is the same, so that votes are counted by value."""
    first: dict[str, str] = {}
    for answer in answers:
        if answer is not None and answer not in first:
            found = (kept for kept in dict.fromkeys(first.values()) if same(kept, answer))
            first[answer] = next(found, answer)
    return [None if answer is None else first[answer] for answer in answers]
