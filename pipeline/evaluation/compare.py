"""`python -m pipeline compare A B`: two evaluations of one benchmark, question by question.

The last line on stdout is JSON: `n` questions, `a` and `b` (pass@1), `difference` b - a with its 95 %
`interval`, the two-sided `p_value`, and `changed`, the number of questions of which one has more right
samples. Test and interval (`pipeline.evaluation.intervals`) are paired over questions, or their families;
they are two methods, so near p = 0.05 one may say what the other does not.
"""

import itertools
import json
from collections import Counter
from typing import Any

from pipeline.data.jsonl import JsonObject
from pipeline.errors import UserError
from pipeline.evaluation.intervals import difference_interval, sign_flip
from pipeline.evaluation.leaderboard import incomparable, print_scores
from pipeline.evaluation.saved import read_questions, read_scores
from pipeline.evaluation.scores import families_of
from pipeline.report.template import render, split_thought
from pipeline.run.files import write_atomic
from pipeline.settings.evaluate import CompareSettings

SHOWN = 20
"""Changed questions in the terminal; the page has all."""
LONGEST = 3_900
"""Characters of a transcript on the page; of a longer one its two ends."""
Questions = list[list[JsonObject]]
"""The samples of each question."""
Change = tuple[tuple[int, int], tuple[JsonObject, JsonObject]]
"""Right samples of A and of B, and one of each: the better one's first right, the other's first wrong one."""


def refuse_others(names: tuple[str, str], scores: list[JsonObject], questions: list[Questions]) -> None:
    """Raises `UserError`: the two are not of the same problems, or not of as many samples."""
    inputs, ks = [s["inputs"] for s in scores], [s["k"] for s in scores]
    if inputs[0]["problems_sha256"] != inputs[1]["problems_sha256"]:
        pairs = zip(names, inputs, questions, strict=True)
        of = (f"{name} has {of['benchmark']}, {len(some)} questions" for name, of, some in pairs)
        asked = ([(rows[0]["question"], rows[0]["answer"]) for rows in some] for some in questions)
        differ = (i for i, (x, y) in enumerate(zip(*asked, strict=False)) if x != y)
        where = "".join(f", at first in question {i}" for i in itertools.islice(differ, 1))
        raise UserError(f"other problems are not comparable: {'; '.join(of)}{where}")
    if ks[0] != ks[1]:
        way = f"evaluate one of them again with --samples {max(ks)}"
        raise UserError(f"{names[0]} has {ks[0]} samples a problem, {names[1]} has {ks[1]}; {way}")


def paired(a: Questions, b: Questions) -> tuple[dict[str, Any], list[Change]]:
    """The result for programs (see above), and what changed, the most first, the worse for B before."""
    n, k = len(a), len(a[0])
    marks = [[[row["verdict"] == "correct" for row in rows] for rows in some] for some in (a, b)]
    right = [(sum(x), sum(y)) for x, y in zip(*marks, strict=True)]
    gains = [y - x for x, y in right]
    families = families_of([rows[0] for rows in a])
    sums = Counter[int | str]()
    for family, gain in zip(families or list(map(str, range(n))), gains, strict=True):
        sums[family] += gain
    changed = list[Change]()
    for i in sorted((i for i in range(n) if gains[i]), key=lambda i: (-abs(gains[i]), gains[i])):
        first = marks[0][i].index(gains[i] < 0), marks[1][i].index(gains[i] > 0)
        changed.append((right[i], (a[i][first[0]], b[i][first[1]])))
    low, high = difference_interval([gain / k for gain in gains], families)
    result = {"n": n, "a": sum(x for x, _ in right) / (n * k), "b": sum(y for _, y in right) / (n * k)}
    result |= {"difference": sum(gains) / (n * k), "interval": [low, high]}
    return result | {"p_value": sign_flip(list(sums.values())), "changed": len(changed)}, changed


def in_words(result: dict[str, Any]) -> str:
    """The result in a sentence."""
    low, high = (100 * bound for bound in result["interval"])
    p = f"p = {result['p_value']:.2g}" if result["p_value"] >= 1e-4 else "p < 0.0001"
    gain = f"B - A = {100 * result['difference']:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f}, {p}"
    says = "they differ" if result["p_value"] < 0.05 else "no difference is shown"
    return f"{gain}: {says}. {result['changed']} of {result['n']} questions changed."


def shown_sample(label: str, row: JsonObject, right: int, k: int) -> dict[str, Any]:
    """What the page shows of a sample."""
    text = row["text"]
    if len(text) > LONGEST:
        half = LONGEST // 2
        text = f"{text[:half]}\n[… {len(text) - LONGEST} characters …]\n{text[-half:]}"
    who = f"{label}: {right} of {k}, sample {row['sample']}" if k > 1 else label
    return row | split_thought(text) | {"label": who}


def main(config: CompareSettings) -> None:
    """The command."""
    folders, names = (config.first, config.second), (str(config.first), str(config.second))
    scores = [read_scores(folder) for folder in folders]
    questions = [read_questions(folder, s) for folder, s in zip(folders, scores, strict=True)]
    refuse_others(names, scores, questions)
    result, changed = paired(*questions)
    k, benchmark = scores[0]["k"], scores[0]["inputs"]["benchmark"]
    rows = [(f"{x}: {name}", s) for x, name, s in zip("AB", names, scores, strict=True)]
    console = print_scores(benchmark, rows)
    console.print(in_words(result))
    for right, (row, _) in changed[:SHOWN]:
        x, y = (f"{r} of {k}" if k > 1 else ("wrong", "right")[r] for r in right)
        console.print(f"  {x} -> {y}  {row['id']}: {' '.join(row['question'].split())[:90]}")
    if len(changed) > SHOWN:
        console.print(f"  and {len(changed) - SHOWN} more: --out FILE.html shows all, with transcripts")
    if config.out:
        pages = [(r, [shown_sample(*of, k) for of in zip("AB", two, r, strict=True)]) for r, two in changed]
        tables = [(benchmark, rows, list(incomparable(rows)))]
        given = {"title": f"A and B on {benchmark}", "lead": in_words(result), "tables": tables}
        write_atomic(config.out, render("scores.html.j2", **given, changed=pages, left_out=[]))
    print(json.dumps(result))
