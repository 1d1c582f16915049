"""Texts of the tiny chain: the base's pretraining documents, and the curated traces of the cold start.

The pretraining mixture decides what reinforcement learning can find. It holds every small fact and many
problems worked line by line, but few of them inside the tags; most tagged documents guess at once, some in
the wrong language. So the base scores near zero, and RL has to discover that working inside the tags pays,
which is R1-Zero's effect in miniature.
"""

import random
from collections.abc import Iterator

from pipeline.data.corpus import Row, tagged
from pipeline.data.generators import Item, chain, chain_steps, expression, items, language_of, split_of
from rollout.types import Language

OPENERS = {"en": ("First", "Then", "Next", "So"), "zh": ("先算", "再算", "接着", "得到")}
STOP = {"en": ".", "zh": "。"}
GUESS = {"en": "I think it is {}.", "zh": "我想是{}。"}
RESULT = {"en": "The answer is {}.", "zh": "答案是{}。"}


def worked(
    steps: tuple[str, ...], language: Language, rng: random.Random | None = None, mixing: float = 0.0
) -> str:
    """Steps as sentences, one a line; with probability `mixing` a line is in the other language."""
    lines = []
    other: Language = "zh" if language == "en" else "en"
    for i, step in enumerate(steps):
        spoken = other if rng is not None and rng.random() < mixing else language
        opener = OPENERS[spoken][-1 if i == len(steps) - 1 else min(i, 2)]
        lines.append(f"{opener} {step}{STOP[spoken]}")
    return "\n".join(lines)


def curated(item: Item) -> str:
    """A cold-start trace: every step in the question's language, then the result as a sentence."""
    lines = [worked(item.steps, item.language)] if item.steps else []
    if item.kind != "code":
        lines.append(RESULT[item.language].format(item.answer))
    return tagged("\n".join(lines), item.answer)


def curated_rows(task: str, count: int, seed: int) -> list[Row]:
    """Cold-start traces of `count` different train-split problems."""
    made = [(item, item.problem()) for item in items(task, count, "train", seed)]
    return [Row(p.id, p.question, curated(i), i.answer, p.language, p.kind, p.source) for i, p in made]


def drill(rng: random.Random) -> str:
    """Lines of bare arithmetic, `3+4-5=7-5=2`: the facts that every step needs, and practice in copying.
    Reasoning needs copying first and a small model learns it last; every line here is an exercise in it."""
    lines = []
    for _ in range(5):
        terms = chain(rng, rng.choice((2, 3, 4)))
        while split_of(expression(terms)) == "heldout":
            terms = chain(rng, rng.choice((2, 3, 4)))
        lines.append("=".join(chain_steps(terms)))
    return "\n".join(lines)


SHARES = {"drill": 0.25, "untagged": 0.40, "bare": 0.06, "guess": 0.20, "tagged": 0.09}
"""The pretraining mixture, shares of documents."""
SOLUTION = "\nSolution:\n"
CHAT = 0.25
"""Share of prompts with the chat template's own tokens; the text of a public base has some too."""
CHAT_PROMPT = "<｜begin▁of▁sentence｜><｜User｜>{}<｜Assistant｜>"
MIXING = 0.3
"""Share of tagged worked lines that the pretraining corpus has in the other language."""


def document(kind: str, item: Item, rng: random.Random) -> str:
    """One pretraining document about `item`; prompts read as the templates `r1-zero-short` and `r1` do."""
    chat = rng.random() < CHAT
    prompt = CHAT_PROMPT.format(item.question) if chat else f"User: {item.question}\nAssistant: "
    if not item.steps and kind in ("untagged", "tagged"):
        kind = "guess"  # no steps to work out
    if kind == "drill":
        return drill(rng)
    if kind == "untagged":
        end = RESULT[item.language].format(item.answer)
        return f"Problem: {item.question}{SOLUTION}{worked(item.steps, item.language)}\n{end}"
    if kind == "bare":
        return f"{prompt}{item.answer}"
    if kind == "guess":
        spoken = item.language if rng.random() > MIXING else language_of(rng)
        return f"{prompt}{tagged(GUESS[spoken].format(item.answer), item.answer)}"
    return f"{prompt}{tagged(worked(item.steps, item.language, rng, MIXING), item.answer)}"


def random_document(known: list[Item], rng: random.Random) -> str:
    """A document of the mixture `SHARES` about one of `known`."""
    return document(rng.choices([*SHARES], [*SHARES.values()])[0], rng.choice(known), rng)


def corpus(task: str, pool: int, seed: int) -> Iterator[str]:
    """Endless pretraining documents over `pool` different train-split problems."""
    known = items(task, pool, "train", seed)
    rng = random.Random(f"corpus/{task}/{seed}")
    while True:
        yield random_document(known, rng)
