"""Language consistency: the share of a completion's words that are in the target language.

arXiv:2501.12948, Sec. 2.3.2 ("the proportion of target language words in the CoT"). A word is a run of
letters of one alphabet, or a single Han character. What is not prose says nothing about the language and
is left out: maths, numbers, code, tags, single-letter variables, names of functions, and in code
problems the answer (it is a program) and Python's keywords.
"""

from __future__ import annotations

import keyword
import re

from rollout.types import Language

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


def language_consistency(completion: str, target: Language, *, code: bool = False) -> float:
    """Share of words in the target language, 0 .. 1; 1 where there are no words at all.

    Args:
        completion: Whole completion, tags included.
        target: `en` or `zh`.
        code: The problem asks for a program: `<answer>` and Python's keywords are left out.
    """
    if code:
        completion = _ANSWER.sub(" ", completion)
    counts = {"en": 0, "zh": 0, "other": 0}
    for match in _WORD.finditer(_NOT_PROSE.sub(" ", completion)):
        script = match.lastgroup
        if script is None or script == "notation":
            continue
        if script == "en":
            word = match[0]
            if len(word) == 1 or word.lower() in _FUNCTIONS or (code and keyword.iskeyword(word)):
                continue
        counts[script] += 1
    words = sum(counts.values())
    return counts[target] / words if words else 1.0
