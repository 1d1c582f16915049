"""Rewards on how a completion is written: format, language, repetition, length.

Papers  format      arXiv:2501.12948  Sec. 2.2.2: one think block, then one answer block
        language    arXiv:2501.12948  Sec. 2.3.2: "the proportion of target language words in the CoT"
        overlong    arXiv:2503.14476  Eq. 13: soft punishment near the length limit
        repetition  in neither: rewards on the answer alone let a policy go round in circles, and several open
                    reproductions of R1 punish repeated n-grams for that
"""

import keyword
import re

from rewards.registry import reward
from rollout.types import Language, Problem, Rollout

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_SHAPE = re.compile(r"\s*<think>(?P<think>.*)</think>\s*<answer>(?P<answer>.*)</answer>\s*", re.DOTALL)


@reward("format", "share of rollouts in the think/answer format")
def format_reward(problem: Problem, completion: str) -> float:
    """1 for one think block followed by one answer block and nothing else, else 0."""
    return float(in_format(completion))


def in_format(completion: str) -> bool:
    """Whether `completion` is `<think>…</think> <answer>…</answer>`, both non-empty.

    The template's prefill is part of it: it does not matter whether template or model wrote `<think>`."""
    if any(completion.count(tag) != 1 for tag in _TAGS):
        return False  # with each tag there exactly once, the greedy pattern below cannot backtrack far
    shape = _SHAPE.fullmatch(completion)
    return shape is not None and bool(shape["think"].strip()) and bool(shape["answer"].strip())


# What is not prose tells nothing about the language.
_NOT_PROSE = re.compile(
    r"""
      ```.*?(?:```|\Z)                       # fenced code, closed or cut off
    | `[^`\n]*`                              # inline code
    | \$\$.*?\$\$ | \$[^$\n]*\$              # maths between dollars
    | \\\[.*?\\\] | \\\(.*?\\\)              # maths between \[ \] and \( \)
    | \\(?:boxed|text|mathrm|operatorname)\{[^{}]*\}
    | \\begin\{(\w+\*?)\}.*?\\end\{\1\}
    | \\[A-Za-z]+                            # other LaTeX commands
    | </?(?:think|answer)>
    """,
    re.VERBOSE | re.DOTALL,
)
_ANSWER = re.compile(r"<answer>.*?(?:</answer>|\Z)", re.DOTALL)
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_LATIN = "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f"
_WORD = re.compile(
    rf"(?P<zh>[{_HAN}])"
    # An identifier or a unit stuck to a number (x_1, 3cm, f2) is notation, not a word.
    rf"|(?P<notation>[{_LATIN}]*[0-9_][0-9A-Za-z_]*)"
    rf"|(?P<en>[{_LATIN}]+(?:['’-][{_LATIN}]+)*)"
    rf"|(?P<other>[^\W\d_{_HAN}{_LATIN}]+)"  # kana, Hangul, Cyrillic, …
)
_FUNCTIONS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp sqrt lim max min gcd lcm mod "  # noqa: SIM905
    "det arg deg abs floor ceil sup inf dx dy dt pi ok".split()
)


@reward("language", "mean share of words in the target language")
def language_reward(problem: Problem, completion: str) -> float:
    """Share of words in the problem's language, 0 .. 1."""
    return language_consistency(completion, problem.language, code=problem.kind == "code")


def language_consistency(completion: str, target: Language, *, code: bool = False) -> float:
    """Share of words in the target language, 0 .. 1; 1 where there are no words at all.

    A word is a run of letters of one alphabet, or a single Han character. Single-letter variables and names
    of functions (`sin`) are not counted, nor, with `code`, the `<answer>` (a program) and Python's keywords.
    """
    if code:
        completion = _ANSWER.sub(" ", completion)
    counts: dict[str | None, int] = {"en": 0, "zh": 0, "other": 0}
    for match in _WORD.finditer(_NOT_PROSE.sub(" ", completion)):
        script, word = match.lastgroup, match[0]
        no_word = len(word) == 1 or word.lower() in _FUNCTIONS or (code and keyword.iskeyword(word))
        if script in counts and not (script == "en" and no_word):
            counts[script] += 1
    words = sum(counts.values())
    return counts[target] / words if words else 1.0


N = 8  # of an n-gram; worked arithmetic repeats shorter runs for good reason (`= 12`, `Then`, `so x`)
# Words, single Han characters, numbers and signs: the same measure in both languages and in mathematics.
_TOKEN = re.compile(f"[{_HAN}]|[^\\W\\d_]+|\\d+|[^\\w\\s]|_")


@reward("repetition", "less the mean share of 8-grams that a completion repeats, -1 to 0")
def repetition_reward(problem: Problem, completion: str) -> float:
    """Less the share of n-grams that occurred before, -1 .. 0."""
    return 0.0 - repetition(completion)  # no -0.0 in the logs


def repetition(completion: str, n: int = N) -> float:
    """Share of the n-grams that occurred before, 0 .. 1; 0 for a completion of less than n + 1 words."""
    tokens = [match[0].lower() for match in _TOKEN.finditer(completion)]
    grams = list(zip(*(tokens[start:] for start in range(n)), strict=False))
    return (len(grams) - len(set(grams))) / len(grams) if grams else 0.0


@reward("overlong", "mean soft punishment of completions near max_tokens (DAPO Eq. 13), 0 to -1")
def overlong_reward(problem: Problem, completion: str, rollout: Rollout, buffer_tokens: int = 0) -> float:
    """`soft_overlong` of the rollout, whose limit is known; 0 .. -1."""
    if not rollout.max_tokens:
        raise ValueError("the rollout does not record the max_tokens that it was sampled under")
    return soft_overlong(len(rollout.token_ids), rollout.max_tokens, buffer_tokens)


def soft_overlong(tokens: int, max_tokens: int, buffer_tokens: int) -> float:
    """Reward in [-1, 0] for a completion of `tokens` tokens: 0 up to the buffer, then a ramp down to -1.

        0                                       tokens <= max - buffer
        ((max - buffer) - tokens) / buffer      max - buffer < tokens <= max
        -1                                      max < tokens

    `max_tokens` is the paper's L_max, `buffer_tokens` its L_cache: the ramp's length, 0 = a step at the end.
    ValueError: the buffer is negative or longer than `max_tokens`."""
    if not 0 <= buffer_tokens <= max_tokens:
        raise ValueError(f"buffer_tokens={buffer_tokens} must lie in 0 .. max_tokens={max_tokens}.")
    free = max_tokens - buffer_tokens
    if tokens <= free:
        return 0.0
    if tokens > max_tokens:
        return -1.0
    return (free - tokens) / buffer_tokens
