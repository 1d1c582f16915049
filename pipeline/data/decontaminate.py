"""Training problems less the near copies of evaluation problems; evaluation problems that a corpus holds."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeline.data.problems import problems
from pipeline.errors import UserError
from rollout.types import Problem

NGRAM = 10
"""Words of the n-grams by which near copies are found."""

# Spacing, maths delimiters and sentence marks; signs, operators and decimal points make another problem.
_LOOSE = re.compile(r"\\[,;: ]|\\(?:left|right)\b|[\s${}\"'“”‘’,;:?。，？：；]|\.(?!\d)")
_WORD = re.compile(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+")


def normalised(text: str) -> str:
    """Text without case, spacing, `$`, braces and sentence marks."""
    return _LOOSE.sub("", text.casefold())


def ngrams(text: str) -> frozenset[tuple[str, ...]]:
    """The different word 10-grams of a text, lower case; a Han character is a word."""
    words = _WORD.findall(text.lower())
    return frozenset(tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1))


def decontaminate(train: Iterable[Problem], heldout: Iterable[Problem]) -> list[Problem]:
    """The training problems that are no copy, or near copy, of an evaluation problem. Dropped is a problem
    with the same normalised text as an evaluation problem, and one that has half or more of its own word
    10-grams in common with a single one (the same problem with other numbers)."""
    exact: set[str] = set()
    holders: dict[tuple[str, ...], list[int]] = {}
    for index, problem in enumerate(heldout):
        exact.add(normalised(problem.question))
        for gram in ngrams(problem.question):
            holders.setdefault(gram, []).append(index)

    def is_copy(problem: Problem) -> bool:
        if normalised(problem.question) in exact:
            return True
        grams = ngrams(problem.question)
        shared = Counter(index for gram in grams for index in holders.get(gram, ()))
        return bool(grams) and 2 * max(shared.values(), default=0) >= len(grams)

    return [problem for problem in train if not is_copy(problem)]


def without_copies(
    train: Sequence[Problem], benchmarks: Sequence[str], folder: Path | None
) -> tuple[list[Problem], str]:
    """`train` less the copies of problems of `benchmarks`, and one line on it, which also names those that
    cannot be read. Raises `UserError`: nothing is left."""
    heldout, unread = list[Problem](), dict[str, str]()
    for name in benchmarks:
        try:
            heldout += problems(name, data_dir=folder)
        except UserError as error:
            unread[name] = f"; not compared with {name} ({str(error).removeprefix(f'{name}: ')[:60]})"
    kept, read = decontaminate(train, heldout), [name for name in benchmarks if name not in unread]
    names = ", ".join(read) or "no benchmark"
    if train and not kept:
        raise UserError(f"all {len(train)} problems are copies of {names}: take others, or --heldout")
    return kept, f"{len(train) - len(kept)} copies of {names} are left out" + "".join(unread.values())


def copied(questions: Sequence[str], corpus: Iterable[str]) -> tuple[set[int], set[int]]:
    """Indices of the questions of which `corpus`, questions too, has a copy (the same normalised text), and a
    near copy (half or more of the question's own word 10-grams). The corpus is read once and not kept."""
    exact: dict[str, list[int]] = {}
    holders: dict[tuple[str, ...], list[int]] = {}
    grams = [ngrams(question) for question in questions]
    for index, question in enumerate(questions):
        exact.setdefault(normalised(question), []).append(index)
        for gram in grams[index]:
            holders.setdefault(gram, []).append(index)
    copies, near = set[int](), set[int]()
    for text in corpus:
        shared = Counter(index for gram in ngrams(text) for index in holders.get(gram, ()))
        copies.update(exact.get(normalised(text), ()))
        near.update(index for index, count in shared.items() if 2 * count >= len(grams[index]))
    return copies, near
