"""Training data less what holds an evaluation problem; evaluation problems that a corpus holds.

A text holds a problem with the same normalised text, and one of which it has half or more of the problem's
own word 10-grams, or all of its words where it has fewer: a copy in an instruction, a conversation or a
few-shot prompt is found, and the same problem with other numbers. (GPT-3's training set: 13-grams,
arXiv:2005.14165, App. C.)
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from rollout.types import Problem

NGRAM = 10
"""Words of the n-grams."""

# Spacing, maths delimiters and sentence marks; signs, operators and decimal points make another problem.
_LOOSE = re.compile(r"\\[,;: ]|\\(?:left|right)\b|[\s${}\"'“”‘’,;:?。，？：；]|\.(?!\d)")
_WORD = re.compile(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+")
_SYMBOL = re.compile(rf"\d+\.\d+|{_WORD.pattern}|[^\w\s]")


def normalised(text: str) -> str:
    """Text without case, spacing, `$`, braces and sentence marks."""
    return _LOOSE.sub("", text.casefold())


def ngrams(text: str) -> frozenset[tuple[str, ...]]:
    """The different word 10-grams of a text, lower case; a Han character is a word."""
    words = _WORD.findall(text.lower())
    return frozenset(tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1))


def symbols(text: str) -> str:
    """Words, signs and operators, each between spaces."""
    return f" {' '.join(_SYMBOL.findall(_LOOSE.sub(' ', text.casefold())))} "


class Questions:
    """Evaluation problems, to find those that a text holds."""

    def __init__(self, questions: Sequence[str]) -> None:
        self.exact: dict[str, list[int]] = {}
        self.holders: dict[tuple[str, ...], list[int]] = {}
        self.sizes, self.short = list[int](), list[tuple[int, str]]()
        for index, question in enumerate(questions):
            grams, text = ngrams(question), symbols(question)
            self.exact.setdefault(normalised(question), []).append(index)
            self.sizes.append(len(grams))
            for gram in grams:
                self.holders.setdefault(gram, []).append(index)
            if not grams and text.strip():
                self.short.append((index, text))

    def held_by(self, text: str) -> tuple[set[int], set[int]]:
        """Indices of the problems that `text` is a copy of, and of those that it holds in another way."""
        copies = set(self.exact.get(normalised(text), ()))
        shared = Counter(index for gram in ngrams(text) for index in self.holders.get(gram, ()))
        near = {index for index, count in shared.items() if 2 * count >= self.sizes[index]}
        if self.short:
            whole = symbols(text)
            near.update(index for index, question in self.short if question in whole)
        return copies, near - copies


def decontaminate(train: Iterable[Problem], heldout: Iterable[Problem]) -> list[Problem]:
    """The training problems that hold no evaluation problem."""
    questions = Questions([problem.question for problem in heldout])
    return [problem for problem in train if not any(questions.held_by(problem.question))]


def copied(questions: Sequence[str], corpus: Iterable[str]) -> tuple[set[int], set[int]]:
    """Indices of the questions of which `corpus`, questions too, has a copy, and of those that it holds in
    another way. The corpus is read once and not kept."""
    index, copies, near = Questions(questions), set[int](), set[int]()
    for text in corpus:
        same, held = index.held_by(text)
        copies |= same
        near |= held
    return copies, near
