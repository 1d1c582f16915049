"""`python -m pipeline compare A B`: two evaluations of one benchmark, question by question.

The last line on stdout is JSON: `n` questions, `a` and `b` (pass@1), `difference` b - a with its 95 %
`interval`, the two-sided `p_value`, and `changed`, the number of questions of which one has more right samples.
Test and interval are `pipeline.evaluation.intervals`': paired over questions, or over their families. They are
two methods, so near p = 0.05 one may say what the other does not.
"""

import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.errors import UserError
from pipeline.evaluation.intervals import difference_interval, sign_flip
from pipeline.evaluation.saved import Row, ScoreFile, read_questions, read_scores
from pipeline.evaluation.scores import families_of, percent
from pipeline.report.template import render, split_thought
from pipeline.run.files import write_atomic
from pipeline.settings.evaluate import CompareSettings

SHOWN = 20
"""Changed questions in the terminal; the page has all."""
LONGEST = 6_000
"""Characters of a transcript on the page; of a longer one its two ends."""


@dataclass(frozen=True, slots=True)
class Change:
    """A question of which the two have unequally many right samples."""

    right: tuple[int, int]
    """Of A and of B."""
    rows: tuple[Row, Row]
    """A sample of each: the better one's first right, the other's first that is not."""


def refuse_others(
    folders: tuple[Path, Path], scores: list[ScoreFile], questions: list[list[list[Row]]]
) -> None:
    """Raises `UserError`: the two are not of the same problems and samples."""
    (a, b), (first, second) = folders, scores
    if first.inputs.problems_sha256 != second.inputs.problems_sha256:
        of = [
            f"{folder}: {s.inputs.benchmark}, {s.n} problems"
            for folder, s in zip(folders, scores, strict=True)
        ]
        asked = [[(rows[0].question, rows[0].answer) for rows in some] for some in questions]
        differ = (i for i, pair in enumerate(zip(*asked, strict=False)) if pair[0] != pair[1])
        where = next((f"; the first that differs is number {i}" for i in differ), "")
        raise UserError(
            f"other problems cannot be compared ({'; '.join(of)}{where}); evaluate both on the same"
        )
    if first.k != second.k:
        way = f"evaluate one of them again with --samples {max(first.k, second.k)}"
        raise UserError(f"{a} has {first.k} samples a problem, {b} has {second.k}; {way}")


def changes(a: list[list[Row]], b: list[list[Row]]) -> list[Change]:
    """What changed, the worst for B first."""
    found = []
    for pair in zip(a, b, strict=True):
        marks = [[row.verdict == "correct" for row in rows] for rows in pair]
        right = sum(marks[0]), sum(marks[1])
        if right[0] != right[1]:
            better = right[0] > right[1], right[1] > right[0]
            one, other = (rows[m.index(good)] for rows, m, good in zip(pair, marks, better, strict=True))
            found.append(Change(right, (one, other)))
    return sorted(found, key=lambda change: change.right[1] - change.right[0])


def paired(a: list[list[Row]], b: list[list[Row]]) -> dict[str, Any]:
    """The result for programs (see above), from the samples of the same questions."""
    n, k = len(a), len(a[0])
    counts = [[sum(row.verdict == "correct" for row in rows) for rows in some] for some in (a, b)]
    gains = [y - x for x, y in zip(*counts, strict=True)]
    of = families_of([{"labels": rows[0].labels} for rows in a])
    sums = Counter[str | int]()
    for family, gain in zip(of or range(n), gains, strict=True):
        sums[family] += gain
    first, second = (sum(some) / (n * k) for some in counts)
    bounds = difference_interval([gain / k for gain in gains], of)
    figures = {"n": n, "a": first, "b": second, "difference": sum(gains) / (n * k), "interval": list(bounds)}
    return {**figures, "p_value": sign_flip(list(sums.values())), "changed": sum(map(bool, gains))}


def show(
    labels: tuple[str, str], scores: list[ScoreFile], result: dict[str, Any], found: list[Change]
) -> None:
    """The result for people."""
    console = Console()
    if not console.is_terminal:
        console.width = 120
    table = Table("", "folder", "model", title=f"{scores[0].inputs.benchmark}, {result['n']} questions")
    for column in ("score", "95 % interval", "k", "cut", "failed", "template"):
        table.add_column(column, justify="right")
    for name, label, s in zip("AB", labels, scores, strict=True):
        low, high = s.interval
        row = percent(s.pass_1), f"{100 * low:.1f} to {100 * high:.1f}", str(s.k), percent(s.truncation_rate)
        table.add_row(name, label, s.inputs.model, *row, str(s.verifier_failures), s.template)
    console.print(table)
    console.print(in_words(result), soft_wrap=True, highlight=False)
    k = scores[0].k
    for change in found[:SHOWN]:
        counts = " -> ".join(f"{r} of {k}" if k > 1 else ("wrong", "right")[r] for r in change.right)
        asked = " ".join(change.rows[0].question.split())
        console.print(
            f"  {counts:16} {change.rows[0].id}: {asked}", overflow="ellipsis", no_wrap=True, markup=False
        )
    if len(found) > SHOWN:
        console.print(f"  and {len(found) - SHOWN} more: --out FILE.html shows all, with their transcripts")


def in_words(result: dict[str, Any]) -> str:
    """Difference, interval and p-value in a sentence."""
    low, high = (100 * bound for bound in result["interval"])
    p = f"p = {result['p_value']:.2g}" if result["p_value"] >= 1e-4 else "p < 0.0001"
    verdict = "B and A differ" if result["p_value"] < 0.05 else "no difference is shown"
    gain = f"B - A = {100 * result['difference']:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f}, {p}"
    return f"{gain}: {verdict}; {result['changed']} of {result['n']} questions changed"


def differing(scores: list[ScoreFile]) -> list[str]:
    """How the two were made otherwise, beside the model: `max_tokens 256 and 512`."""
    a, b = (s.made_as() | {key: getattr(s.inputs, key, None) for key in ("engine", "dtype")} for s in scores)
    return [f"{key} {a.get(key)} and {b.get(key)}" for key in a | b if a.get(key) != b.get(key)]


def transcript(label: str, row: Row, right: int, k: int) -> dict[str, Any]:
    """What the page shows of a sample."""
    text = row.text
    if len(text) > LONGEST:
        cut = f"\n[… {len(text) - LONGEST} characters …]\n"
        text = text[: LONGEST // 2] + cut + text[-LONGEST // 2 :]
    who = f"{label}: {right} of {k}, sample {row.sample + 1}" if k > 1 else label
    return row.model_dump() | split_thought(text) | {"text": text, "label": who}


def main(config: CompareSettings) -> None:
    """The command."""
    folders = config.first, config.second
    scores = [read_scores(folder) for folder in folders]
    questions = [read_questions(folder, s) for folder, s in zip(folders, scores, strict=True)]
    refuse_others(folders, scores, questions)
    labels, k = (str(config.first), str(config.second)), scores[0].k
    result, found = paired(*questions), changes(*questions)
    show(labels, scores, result, found)
    for text in (differ := differing(scores)):
        print(f"A and B differ in more than the model: {text}", file=sys.stderr)
    if config.out:
        pages = [
            (change, [transcript(x, *y, k) for x, *y in zip("AB", change.rows, change.right, strict=True)])
            for change in found
        ]
        given = {
            "labels": labels,
            "scores": scores,
            "result": result,
            "words": in_words(result),
            "pages": pages,
        }
        write_atomic(config.out, render("compare.html.j2", differ=differ, **given))
        print(f"page: {config.out}", file=sys.stderr)
    print(json.dumps(result))
