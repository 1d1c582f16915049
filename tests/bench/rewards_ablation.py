"""Every rule of the grader switched off in turn: which verdicts change where the right one is known?

A rule is a pattern of `rewards.maths`; switched off, it matches nothing. The table holds each rule's
pattern, how many verdicts it decides on our own labelled pairs and on golds with their published solutions
(read from R1_DATA; of those only ids are kept), the first pair of ours that needs it and the class of that
pair, where its source is named. A rule that changes no verdict has no reason to be there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from rewards.maths import compare, extract, grade, notation, prose, relations, single, spans
from rewards.maths.values import expression, numbers, regions, units
from tests import data
from tests.bench.rewards_agreement import unboxed
from tests.rewards import answers, completions

SUMMARY = "each rule of the mathematics grader switched off: how many verdicts it decides"
MODULES = (compare, extract, notation, prose, relations, single, spans, expression, numbers, regions, units)
NEVER = re.compile(r"(?!)")
SAMPLES = {"math500": 3, "gsm8k_test": 12, "olympiadbench": 4, "minerva_math": 3}
"""Every n-th row of each file."""

Case = tuple[str, str, str, bool]
"""Where it is from, gold, completion, whether it is right."""


def own() -> list[Case]:
    """Our labelled pairs, an answer in a box."""
    boxed = [(name, gold, f"\\boxed{{{said}}}", right) for name, gold, said, right in answers.cases()]
    return [case for case in boxed if case[2].count("{") == case[2].count("}")] + completions.cases()


def public() -> list[Case]:
    """Golds in a box and in their solutions, with and without its box."""
    made = []
    for name, step in SAMPLES.items():
        for row in data.rows(name)[::step]:
            texts = [f"So $\\boxed{{{row['answer']}}}$."]
            if row.get("solution"):
                texts += [row["solution"], unboxed(row["solution"])]
            made += [(row["id"], row["answer"], text, True) for text in texts]
    return made


def verdicts(cases: list[Case]) -> list[bool]:
    """Of the grader as it is now, with nothing remembered."""
    for module in (*MODULES, grade):
        for function in vars(module).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()
    said = [extract.final_answer(text, "lenient") for _, _, text, _ in cases]
    return [
        answer is not None and grade.grade_math(case[1], answer).value == 1
        for case, answer in zip(cases, said, strict=True)
    ]


def rules() -> Iterator[tuple[str, str, Callable[[bool], None]]]:
    """Name, pattern, and a switch of each rule."""
    seen: set[int] = set()
    for module in MODULES:
        for name, pattern in list(vars(module).items()):
            if isinstance(pattern, re.Pattern) and id(pattern) not in seen:
                seen.add(id(pattern))
                holders = [(m, n) for m in MODULES for n, value in vars(m).items() if value is pattern]
                rule = module.__name__.removeprefix("rewards.maths.")
                yield f"{rule}.{name}", pattern.pattern, _switch(holders, pattern)
    for i, (pattern, written) in enumerate(notation._SYNONYMS):
        yield f"notation: {written.strip()}", pattern.pattern, _synonym(i)


def _switch(holders: list[tuple[Any, str]], pattern: re.Pattern[str]) -> Callable[[bool], None]:
    def switch(on: bool) -> None:
        for module, name in holders:
            setattr(module, name, pattern if on else NEVER)

    return switch


def _synonym(i: int) -> Callable[[bool], None]:
    kept = notation._SYNONYMS[i]

    def switch(on: bool) -> None:
        notation._SYNONYMS[i] = kept if on else (NEVER, "")

    return switch


def run() -> dict[str, Any]:
    """All rules, one after the other."""
    ours, theirs = own(), public()
    cases = ours + theirs
    before = verdicts(cases)
    table = []
    for name, pattern, switch in rules():
        switch(False)
        try:
            after = verdicts(cases)
        except Exception:  # its groups are used where it always matches
            after = [not verdict for verdict in before]
        finally:
            switch(True)
        changed = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
        mine = [ours[i] for i in changed if i < len(ours)]
        table.append({
            "rule": name, "pattern": pattern, "own": len(mine), "public": len(changed) - len(mine),
            "right_verdicts_lost": sum(before[i] == cases[i][3] for i in changed),
            "example": mine[0][1:3] if mine else None,
            "source": mine[0][0] if mine else next((cases[i][0] for i in changed), None),
        })  # fmt: skip
        print(f"  {name:40} own {len(mine):4} public {len(changed) - len(mine):5}", flush=True)
    idle = [row["rule"] for row in table if not row["own"] and not row["public"]]
    harmful = [row["rule"] for row in table if row["right_verdicts_lost"] * 2 < row["own"] + row["public"]]
    return {
        "claims": [
            {"claim": "rules that change no verdict", "value": len(idle), "at_most": 0},
            {"claim": "rules that cost more than they win", "value": len(harmful), "at_most": 0},
            {"claim": "own pairs judged as labelled", "at_least": 1.0, "unit": "of all",
             "value": sum(v == case[3] for v, case in zip(before, ours, strict=False)) / len(ours)},
        ],
        "cases": {"own": len(ours), "public": len(theirs)},
        "idle": idle,
        "harmful": harmful,
        "rules": table,
    }  # fmt: skip
