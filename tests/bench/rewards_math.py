"""Grading mathematics: ours against math-verify, both in this process, in CPU seconds.

The 5,000 pairs are golds of GSM8K and MATH (read from R1_DATA) in completions as models write them, half of
them right; block by block both grade the same pairs, in alternating order. Verdicts are compared too: where
they differ, the classes of the policy layer (`rewards.maths.compare`) are counted, and examples printed.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import Counter
from typing import Any

from rewards.maths.extract import final_answer
from rewards.maths.grade import grade_math, normalise
from rewards.registry import Outcome
from tests.data import rows

SUMMARY = "grading 5,000 completions: at least 10 times math-verify's throughput, the same verdicts"
PAIRS, BLOCKS, AT_LEAST = 5000, 10, 10.0
_TEMPLATES = (
    "We compute step by step: $2 + 3 = 5$, and so on.\n\nThus the answer is $\\boxed{{{}}}$.",
    "First note that $x > 0$.\n\\[\n\\boxed{{{}}}\n\\]",
    "Let me think about it. There are 12 of them in 3 rows.\n\n**Final Answer**\n\n$\\boxed{{{}}}$",
    "Adding everything up, we find it. The final answer is ${}$. I hope it is correct.",
    "So we have 4 * 5 = 20 of one kind and the rest of the other. The answer is ${}$.",
)
_GSM8K = (
    "She starts with 5 of them and adds 7.\n5 + 7 = 12\n#### {}",
    "So in the end there are 3 left. The answer is {}.",
)


def pairs() -> list[tuple[str, str]]:
    """(gold, completion): two of three from MATH, one from GSM8K; half of them with a wrong answer."""
    choose = random.Random(0)
    maths, grade_school = ([row["answer"] for row in rows(name)] for name in ("math_train", "gsm8k_train"))
    made = []
    for i in range(PAIRS):
        golds, templates = (grade_school, _GSM8K + _TEMPLATES[:1]) if i % 3 == 0 else (maths, _TEMPLATES)
        gold = choose.choice(golds)
        said = gold if choose.random() < 0.5 else choose.choice(golds)
        if choose.random() < 0.3 and "\\left" not in said:  # written in another way
            said = said.replace("\\frac", "\\dfrac").replace("(", "\\left(").replace(")", "\\right)")
        made.append((gold, choose.choice(templates).format(said)))
    return made


def _peer(block: list[tuple[str, str]]) -> list[bool]:
    from math_verify import parse, verify

    return [bool(verify(parse(f"${gold}$"), parse(completion))) for gold, completion in block]


def _ours(block: list[tuple[str, str]]) -> list[str]:
    grade_math.cache_clear()
    return [_word(grade_math(gold, final_answer(text, "lenient") or "")) for gold, text in block]


def run() -> dict[str, Any]:
    """Time both, compare the verdicts."""
    import logging

    logging.disable(logging.WARNING)
    every = pairs()
    size = PAIRS // BLOCKS
    ratios, ours_s, peer_s = [], 0.0, 0.0
    theirs: list[bool] = []
    mine: list[str] = []
    warm = [("\\sqrt{8}", "The answer is $2\\sqrt{2}$."), ("\\pi^2", "The answer is $\\pi\\cdot\\pi$.")]
    _peer(warm)
    _ours(warm)
    for number in range(BLOCKS):
        block = every[number * size : (number + 1) * size]
        seconds = {}
        for name in ("ours", "peer") if number % 2 else ("peer", "ours"):
            begin = time.process_time()
            if name == "ours":
                mine += _ours(block)
            else:
                theirs += _peer(block)
            seconds[name] = time.process_time() - begin
        ratios.append(seconds["peer"] / seconds["ours"])
        ours_s, peer_s = ours_s + seconds["ours"], peer_s + seconds["peer"]
    differing, examples = _differences(every, mine, theirs)
    for example in examples:  # not recorded: the data are not ours to pass on
        print("  ", *example, flush=True)
    return {
        "claims": [
            {"claim": "times math-verify's throughput", "value": statistics.median(ratios), "at_least": AT_LEAST},  # noqa: E501
            {"claim": "share of unexplained differences", "value": differing["unexplained"] / PAIRS,
             "at_most": 0.001, "unit": "of pairs"},
        ],
        "pairs": PAIRS,
        "ours_per_s": PAIRS / ours_s,
        "math_verify_per_s": PAIRS / peer_s,
        "ratio_by_block": ratios,
        "errors": mine.count("error"),
        "differing_verdicts": dict(differing),
    }  # fmt: skip


def _word(outcome: Outcome) -> str:
    return "error" if outcome.value is None else str(outcome.value == 1)


def _differences(
    every: list[tuple[str, str]], mine: list[str], theirs: list[bool]
) -> tuple[Counter[str], list[list[str]]]:
    """Differing verdicts by the policy that explains them; an unexplained one is a defect somewhere."""
    found: Counter[str] = Counter(unexplained=0)
    examples = []
    for (gold, text), ours, peer in zip(every, mine, theirs, strict=True):
        if ours == str(peer):
            continue
        answer = final_answer(text, "lenient") or ""
        reason = _policy(gold, answer, ours)
        found[reason] += 1
        if found[reason] <= 5:
            examples.append([reason, gold, answer, f"ours {ours}", f"math-verify {peer}"])
    return found, examples


def _policy(gold: str, answer: str, ours: str) -> str:
    want, got = normalise(gold), normalise(answer)
    if ours == "True" and want.replace(" ", "") == got.replace(" ", ""):
        return "equal as written, math-verify does not parse or extract it"
    if ours == "error":
        return "unexplained"
    for name, marks in (
        ("percent", ("%",)),
        ("units, degrees, currency", ("text", "mbox", "circ", "\\$", "^{\\mathrm")),
        ("base of a numeral", ("_",)),
        ("choices and words", ("(A", "(B", "(C", "(D", "(E")),
        ("interval ends, tuples, lists", (",", "\\cup", "\\pm", "or")),
        ("assignment", ("=", "\\in")),
        ("mixed number", ("\\frac",) if gold[:1].isdigit() else ()),
    ):
        if any(mark in gold or mark in answer for mark in marks):
            return name
    if want.isalpha() or got.isalpha():
        return "choices and words"
    return "unexplained"
