"""Problems made by rule, for a model small enough to learn them on a laptop.

Five families, in English and Chinese (`gym` in English only): sums (`sum`), the same sums told as a story
(`word`), small functions that must pass tests (`code`), reasoning-gym's `chain_sum` (`gym`), and plain
instructions (`general`). All but the last need several small steps, so that working line by line
pays and guessing does not.

Held-out problems are disjoint from training problems by construction: the split is a hash of what
has to be computed (`key`: "3+4-5", whatever the family, language or wording), so a held-out sum
never appears in training in any guise, nor in the pretraining corpus, which uses the train split only.
"""

import hashlib
import itertools
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from pipeline.errors import UserError
from rollout.types import Kind, Language, Problem

Split = Literal["train", "heldout"]
LARGEST = 10
"""Running values of a sum stay in 0..LARGEST, so that a hundred facts cover every step."""
HELDOUT_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Item:
    """A problem with its worked solution."""

    kind: Kind
    family: str
    language: Language
    question: str
    answer: str
    """The final answer; for code, the function."""
    tests: tuple[str, ...]
    steps: tuple[str, ...]
    """Bare mathematics, one a line: `3+4-5`, `7-5`, `2`, or equations."""
    key: str
    """What has to be computed, free of wording."""

    def problem(self) -> Problem:
        """The item without its solution."""
        name = hashlib.sha256(f"{self.family}|{self.language}|{self.question}".encode()).hexdigest()[:12]
        answer = "" if self.kind == "code" else self.answer
        at, source = f"{self.family}/{name}", f"generator:{self.family}"
        told = answer, self.tests, source, self.language
        return Problem(at, self.kind, self.question, *told, labels={"subject": self.family})


def split_of(key: str) -> Split:
    """The split of a key, the same on every machine and in every version."""
    share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") / 2**32
    return "heldout" if share < HELDOUT_SHARE else "train"


def chain(rng: random.Random, operands: int) -> list[int]:
    """Signed operands, the first positive, whose running sum stays in 0..LARGEST."""
    while True:
        terms = [rng.randint(1, 9)] + [rng.choice((1, -1)) * rng.randint(1, 9) for _ in range(operands - 1)]
        if stays_small(terms):
            return terms


def stays_small(terms: list[int]) -> bool:
    """Whether every running sum is in 0..LARGEST."""
    return all(0 <= total <= LARGEST for total in itertools.accumulate(terms))


def expression(terms: list[int]) -> str:
    """`[3, 4, -5]` -> `3+4-5`."""
    return str(terms[0]) + "".join(f"{t:+d}" for t in terms[1:])


def chain_steps(terms: list[int]) -> tuple[str, ...]:
    """`[3, 4, -5]` -> `("3+4-5", "7-5", "2")`: the expression that is left, one line a step. This makes each
    step local: the first two operands become one, the tail is copied."""
    return tuple(expression([sum(terms[:i]), *terms[i:]]) for i in range(1, len(terms) + 1))


def language_of(rng: random.Random) -> Language:
    """English or Chinese, evenly."""
    return rng.choice(("en", "zh"))


def start(rng: random.Random) -> tuple[list[int], Language]:
    """Three or four operands, and the language that they are asked in."""
    return chain(rng, rng.choice((3, 4))), language_of(rng)


def chain_item(family: str, language: Language, question: str, terms: list[int]) -> Item:
    """An item whose solution is the sum of `terms`."""
    answer, steps, key = str(sum(terms)), chain_steps(terms), expression(terms)
    return Item("math", family, language, question, answer, (), steps, key)


def sum_item(rng: random.Random) -> Item:
    """`What is 3+4-5?`"""
    terms, language = start(rng)
    asks = {"en": ("What is {}?", "Compute {}."), "zh": ("{}等于多少？", "计算{}。")}
    return chain_item("sum", language, rng.choice(asks[language]).format(expression(terms)), terms)


STORIES: dict[Language, tuple[tuple[str, ...], tuple[str, ...], str, str, str, str]] = {
    # who, what, has, gets more, gives away, asks
    "en": (
        ("Tom", "Ann", "Sam", "Mia"), ("apples", "books", "cards", "coins"), "{who} has {n} {what}.",
        " {who} gets {n} more.", " {who} gives away {n}.", " How many {what} now?",
    ),
    "zh": (
        ("小明", "小红", "小李", "小王"), ("个苹果", "本书", "张卡片", "个硬币"), "{who}有{n}{what}。",
        "又得到{n}{what}。", "送出{n}{what}。", "现在有多少{what}？",
    ),
}  # fmt: skip


def word_item(rng: random.Random) -> Item:
    """`Tom has 3 apples. Tom gets 4 more. Tom gives away 5. How many apples now?`"""
    terms, language = start(rng)
    names, things, has, gets, gives, asks = STORIES[language]
    who, what = rng.choice(names), rng.choice(things)
    parts = [has.format(who=who, what=what, n=terms[0])]
    parts += [(gets if t > 0 else gives).format(who=who, what=what, n=abs(t)) for t in terms[1:]]
    return chain_item("word", language, "".join(parts) + asks.format(what=what), terms)


def code_item(rng: random.Random) -> Item:
    """`Write f(x) in Python: add 3, add 4, take 5.`: the total to add is a sum like the others."""
    terms, language = start(rng)
    question, plus, minus, comma = {
        "en": ("Write f(x) in Python: {}.", "add {}", "take {}", ", "),
        "zh": ("用Python写f(x)：{}。", "加{}", "减{}", "，"),
    }[language]
    parts = [(minus if t < 0 else plus).format(abs(t)) for t in terms]
    tests = tuple(f"assert f({x}) == {x + sum(terms)}" for x in (0, 1, 10))
    answer = f"def f(x): return x+{sum(terms)}"
    item = chain_item("code", language, question.format(comma.join(parts)), terms)
    return replace(item, kind="code", answer=answer, tests=tests)


def gym_item(rng: random.Random) -> Item:
    """One of reasoning-gym's `chain_sum` (Apache-2.0), in its wording; English only."""
    from reasoning_gym.arithmetic.chain_sum import ChainSumConfig, ChainSumDataset  # a slow import

    while True:
        of = {"min_terms": 3, "max_terms": 4, "min_digits": 1, "max_digits": 1, "size": 16}
        for entry in ChainSumDataset(ChainSumConfig(**of, seed=rng.randrange(2**31))):
            text = entry["metadata"]["expression"].replace(" ", "")
            terms = [int(t) for t in re.findall(r"[+-]?\d+", text)]
            if 0 not in terms and stays_small(terms):
                return chain_item("gym", "en", entry["question"], terms)


def general_item(rng: random.Random) -> Item:
    """`Copy: 2 books then 3 coins.`: general instructions, nothing to calculate; exact match."""
    language = language_of(rng)
    question, pair, then, *things = {
        "en": ("Copy: {}.", "{} {}", " then ", "apples", "books", "cards", "coins"),
        "zh": ("抄写：{}。", "{}{}", "，", "苹果", "书", "卡片", "硬币"),
    }[language]
    pairs = [(rng.randint(1, 9), rng.choice(things)) for _ in range(2)]
    answer = then.join(pair.format(*of) for of in pairs)
    return Item("general", "general", language, question.format(answer), answer, (), (), f"copy:{pairs}")


def tool_item(rng: random.Random) -> Item:
    """`What is 47*93?`: too much for a small model's head, and a line for the Python tool. A quarter of the
    worked solutions use it; the others guess, so that RL has to discover that it pays."""
    (a, b), language = (rng.randint(11, 99), rng.randint(11, 99)), language_of(rng)
    text, answer = f"{a}*{b}", str(a * b)
    question = {"en": "What is {}?", "zh": "{}等于多少？"}[language].format(text)
    step = f"<python>print({text})</python><output>{answer}</output>"
    return Item("math", "tool", language, question, answer, (), (step,) if rng.random() < 0.25 else (), text)


FAMILIES: dict[str, Callable[[random.Random], Item]] = {
    "sum": sum_item, "word": word_item, "code": code_item, "gym": gym_item, "general": general_item,
    "tool": tool_item,
}  # fmt: skip
MIXTURES: dict[str, dict[str, float]] = {
    "tiny": {"sum": 0.4, "word": 0.3, "code": 0.15, "gym": 0.15},
    "all": {"sum": 0.37, "word": 0.28, "code": 0.14, "gym": 0.14, "general": 0.07},
}
"""Named tasks: families with their shares."""


def items(task: str, count: int, split: Split, seed: int) -> list[Item]:
    """`count` different problems of a family or mixture, of one split. Same arguments, same items.
    Raises `UserError`: the task is unknown, or has fewer than `count` different problems."""
    shares = MIXTURES.get(task) or ({task: 1.0} if task in FAMILIES else None)
    if shares is None:
        raise UserError(f"unknown task {task!r}; there are: {', '.join([*MIXTURES, *FAMILIES])}")
    rng = random.Random(f"{task}/{split}/{seed}")
    found: dict[str, Item] = {}
    misses = 0
    while len(found) < count:
        item = FAMILIES[rng.choices([*shares], [*shares.values()])[0]](rng)
        if split_of(item.key) == split and item.question not in found:
            found[item.question] = item
            continue
        misses += 1
        if misses > 200 * (count + 10):
            kind = f"{count} different {split} problems"
            raise UserError(f"task {task!r} has fewer than {kind}; ask for fewer")
    return list(found.values())


def generate(task: str, count: int, split: Split, seed: int) -> list[Problem]:
    """`items` as problems."""
    return [item.problem() for item in items(task, count, split, seed)]
