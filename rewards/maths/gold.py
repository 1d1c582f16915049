"""Whether reference answers can be verified at all: checked when problems are loaded, not when graded."""

import re
from collections.abc import Sequence

from rewards.maths.grade import grade_math

PROBE = "13.7531"  # a number that is no reference answer: what cannot be told from it cannot be verified
# What data sets put where an answer is missing, or where none can be checked by rules.
_NO_ANSWER = re.compile(
    r"None|NaN|nan|null|NULL|(?i:proof|prove(?:d| it)?|q\.?e\.?d\.?|(?:answer |solution )?not[ _]?(?:found|"
    r"provided|given|available|applicable)|n/?a|tbd|todo|unknown|error|see (?:the )?(?:solution|proof|above|"
    r"below)\b.*|(?:the )?(?:proof|answer|solution) (?:is )?(?:omitted|missing|required|above|below|needed)|"
    r"\[?(?:answer|solution|your answer(?: here)?)\]?)"
)
_STRUCTURE = re.compile(r"\{\s*(?:[\"'].*:.*)?\}|\[\s*(?:[\"'].*)?\]", re.DOTALL)  # a dict, or a list of text


def check_golds(answers: Sequence[str]) -> list[str]:
    """Why each reference answer cannot be verified, or "" where it can."""
    reasons = {answer: _unverifiable(answer) for answer in dict.fromkeys(answers)}
    return [reasons[answer] for answer in answers]


def _unverifiable(answer: str) -> str:
    text = answer.strip().strip("$").removesuffix(".").strip()
    if not text:
        return "it is empty"
    if _NO_ANSWER.fullmatch(text):
        return f"{text[:40]!r} is no answer"
    if _STRUCTURE.fullmatch(text):
        return "it is a structure, not an answer"
    outcome = grade_math(answer, PROBE)
    return outcome.detail if outcome.value is None else ""
