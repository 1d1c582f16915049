"""Read the final answer out of a completion.

Order, first hit wins; each rule takes the last place that matches:

    strict (training)     1. the single <answer>…</answer> outside <think>; a box in it is unwrapped
                          2. the last non-empty \\boxed{…} outside <think>
    lenient (evaluation)  1., 2. as above, then
                          3. `#### 42` (GSM8K)
                          4. "the answer is …"
                          5. "Answer: …"
                          6. 答案是… 答案为… 答案:…
                          7. a completion that is nothing but an expression, plain or LaTeX

What stands inside a closed think block is never an answer. A think block that is never closed hides
everything from strict mode, and nothing from lenient mode: there the completion was often only cut or
the model never learned the tags. All of it is linear in the completion's length.
"""

from __future__ import annotations

import re
from typing import Literal

Mode = Literal["strict", "lenient"]

OPEN, CLOSE = "<think>", "</think>"
LONGEST_STATED = 500  # characters; bounds the work where "the answer is" is all that a completion repeats

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{|\\(?:boxed|fbox)\s+([^\s{}$\\]+)|\\.|[{}]", re.DOTALL)
_HASHES = re.compile(r"^[ \t]*####[ \t]*(\S[^\n]*)$", re.MULTILINE)
_STATED = (
    re.compile(r"\b(?:answer|result)[ \t]+(?:is|equals|would be)\b[ \t]*:?", re.IGNORECASE),
    re.compile(r"\banswer[ \t]*(?:\*\*)?[ \t]*[:：][ \t]*(?:\*\*)?", re.IGNORECASE),
    re.compile(r"答案(?:应该|应当)?(?:[是为][ \t]*[:：]?|[ \t]*[:：])"),
)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|[。！？；]")
_DELIMITED = re.compile(r"\$\$(.+?)\$\$|\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_COMMAND = re.compile(
    r"\\(?:begin|end)\{\w+\*?\}|\\(?:text|mathrm|mbox|textbf|mathbf)\s*\{[^{}]*\}|\\[A-Za-z]+|\\."
)
_LONG_WORD = re.compile(r"[A-Za-z]{2,}|[^\W\d_A-Za-z]{2,}")
_MATHS_WORDS = frozenset("sin cos tan cot sec csc log ln exp sqrt pi lim max min gcd lcm mod inf oo".split())  # noqa: SIM905


def outside_think(completion: str, mode: Mode = "strict") -> str:
    """The completion less its think blocks.

    A `</think>` without an opening tag ends thinking that the template opened. An unclosed `<think>` runs to
    the end in strict mode; in lenient mode only its tag is dropped.
    """
    kept: list[str] = []
    position = 0
    if (close := completion.find(CLOSE)) >= 0 and not -1 < completion.find(OPEN) < close:
        position = close + len(CLOSE)
    while (start := completion.find(OPEN, position)) >= 0:
        kept.append(completion[position:start])
        end = completion.find(CLOSE, start)
        if end < 0:
            position = len(completion) if mode == "strict" else start + len(OPEN)
            break
        position = end + len(CLOSE)
    kept.append(completion[position:])
    return "".join(kept).replace(OPEN, "").replace(CLOSE, "")


def last_boxed(text: str) -> str | None:
    """Content of the non-empty closed `\\boxed{…}` that starts last, so of nested ones the innermost."""
    best: tuple[int, str] | None = None
    stack: list[int] = []  # start of a box's content, or -1 for a plain brace
    for match in _BOX.finditer(text):
        token = match[0]
        if match[1]:
            best = max(best or (-1, ""), (match.start(1), match[1]))
        elif token == "}":
            start = stack.pop() if stack else -1
            if start > (best[0] if best else -1) and text[start : match.start()].strip():
                best = (start, text[start : match.start()].strip())
        elif token == "{":
            stack.append(-1)
        elif len(token) > 2:
            stack.append(match.end())
    return best[1] if best else None


def answer_block(visible: str) -> str | None:
    """The text of the answer block, where there is exactly one and it says something."""
    if visible.count("<answer>") != 1 or visible.count("</answer>") != 1:
        return None
    start, end = visible.find("<answer>") + len("<answer>"), visible.find("</answer>")
    return visible[start:end].strip() or None if start <= end else None


def is_expression(text: str) -> bool:
    """Whether `text` is one line of mathematics rather than prose: no word but the names of functions."""
    text = text.strip()
    if not text or len(text) > 500 or "\n" in text:
        return False
    bare = _COMMAND.sub(" ", text.strip("$"))
    if any(word.lower() not in _MATHS_WORDS for word in _LONG_WORD.findall(bare)):
        return False
    return any(character.isalnum() for character in text)


def final_answer(completion: str, mode: Mode) -> str | None:
    """The final answer as text, or `None` where the completion gives none; the module says in which order."""
    visible = outside_think(completion, mode)
    block = answer_block(visible)
    if block is not None:
        boxed = last_boxed(block)
        if boxed is None and mode == "lenient":
            boxed = _stated(block)
        return boxed or block
    boxed = last_boxed(visible)
    if boxed is not None or mode == "strict":
        return boxed
    for match in reversed(_HASHES.findall(visible)):
        if is_expression(match):  # else it is a heading: "#### Step 4"
            return str(match).strip()
    return _stated(visible) or (_trim(visible) if is_expression(_trim(visible)) else None)


def _stated(text: str) -> str | None:
    """What the text says the answer is, by rules 4 to 6."""
    for pattern in _STATED:
        for end in reversed([match.end() for match in pattern.finditer(text)]):
            said = text[end : end + LONGEST_STATED].partition("\n")[0]
            delimited = _DELIMITED.search(said)
            stop = _SENTENCE_END.search(said)
            if delimited and (stop is None or delimited.start() < stop.start()):
                said = next(group for group in delimited.groups() if group)
            elif stop:
                said = said[: stop.start()]
            if said := _trim(said):
                return said
    return None


def _trim(text: str) -> str:
    """Without the white space, emphasis and full stops around it."""
    return text.strip().strip("*").strip().rstrip(".。,，").strip("*").strip()
