r"""Read the final answer out of a completion.

What counts at all: the text before the model's own end-of-turn token, without closed think blocks. Then

    strict (training)     1. the one <answer>…</answer>; a box in it is unwrapped
                          2. the last non-empty \boxed{…}
    lenient (evaluation)  1. the last <answer>…</answer>, read like a completion of its own
                          2. whichever comes last of \boxed{…}, `#### 42`, "the final answer is 42"
                          3. the last "the answer is …", "Answer: …", "A: …", 答案是…, or what follows a
                             heading "Answer"
                          4. a completion that is nothing but an expression, plain or LaTeX
                          5. the last expression that is stated: maths, bold text or a number in the last
                             sentence that has one, unless the text breaks off before that sentence is over

Several boxes on one line joined by a comma or a word are one answer with several members, and so are several
formulas after "the answer is"; so hedging (`\boxed{3} or \boxed{4}`) reads as two values, not as the last.
When a model goes on to ask itself a new question after having answered, the answer is the one before it.

What is inside a closed think block is never an answer. A block that is never closed hides everything from
strict mode, and nothing from lenient mode: there the completion was often only cut, or the model never
learned the tags. Likewise an answer that the end of the text cuts off, `\boxed{12`, is no answer.
"""

import re
from itertools import islice
from typing import Literal

from rewards.maths.prose import denied, last_stated, value_after
from rewards.maths.spans import Span, boxes, is_expression, maths, trim

Mode = Literal["strict", "lenient"]

OPEN, CLOSE = "<think>", "</think>"
MOST_QUESTIONS = 4  # that a model asks itself are looked at
MOST_MARKERS = 64  # places "the answer is" is looked at, from the end, where that is all a completion repeats

_END_OF_TURN = re.compile(
    r"<\|(?:[a-z_]*(?:end|eo[stm])[a-z_]*|return)\|>|</s>|<eos>|<end_of_turn>|<｜end▁of▁sentence｜>"
)
_NEXT_QUESTION = re.compile(
    r"\n[ \t]*(?:\*\*|#{1,4}[ \t]*)?(?:(?:Question|Problem|Q|Human|User|Instruction)(?:[ \t]*\d+)?[ \t]*[:：]|"  # noqa: E501
    r"<\|(?:im_start|start_header_id)\|>)"
)
_BLOCK = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_HASHES = re.compile(r"####[ \t]*([^\n]{1,200})")
_HEADING = re.compile(r"\d+[.):]\s+[A-Za-z]|[A-Za-z]{2,}")
_VALUE = re.compile(r"[\d\\=+^]|^\W*[A-Za-z]\b")
_LABELLED = re.compile(
    r"[A-Za-z][A-Za-z ]{0,30}[=:]\s*[^,=:]{1,40}(?:,\s*[A-Za-z][A-Za-z ]{0,30}[=:]\s*[^,=:]{1,40})+"
)
_WORDS = re.compile(r"[A-Za-z]+(?: [A-Za-z]+)?")
_JOINT = re.compile(
    r"(?:[\s$,;、]|\\[()\[\];,! ]|\\q?quad|\\text\s*\{\s*(?:and|or|,)?\s*\}|\b(?:and|or)\b|和|或|[A-Za-z]\s*=)*"  # noqa: E501
)
_MARKERS = (
    # "the answer to … is", "Final Answer:", "**Answer**", but not "answers", "answered", "answer key is"
    re.compile(
        r"(?P<final>\bfinal[ \t]+)?\b(?:answer|ans)\b(?!\s+(?:key|choice|option)s?)[^\n.:：=?!]{0,80}?"
        r"(?:\b(?:is|are|was|equals|be|becomes)\b(?!\s*n[o']t)|[:：=]|\.?[ \t]{0,9}(?:\*\*)?[ \t]{0,9}\n)",
        re.IGNORECASE,
    ),
    re.compile(r"(?P<final>最终|最后)?的?答案(?:应该|应当|应|就|便)?(?:[是为][ \t]*[:：]?|等于|[ \t]*[:：])"),
    re.compile(r"(?P<final>)^[ \t]*(?:\*\*)?A(?:\*\*)?[:：](?:\*\*)?", re.MULTILINE),
    re.compile(
        r"(?P<final>)(?<!不)选(?:择|项)?[是为]?[ \t]*[:：]?[ \t]*(?=[(（]?[A-J](?![A-Za-z、,，和或]))"
    ),
    re.compile(r"(?P<final>)\bcorrect[ \t]+(?:option|choice)[ \t]+is\b", re.IGNORECASE),
)


def outside_think(completion: str, mode: Mode = "strict") -> str:
    """The completion less its think blocks.

    A `</think>` without an opening tag ends thinking that the template opened. An unclosed `<think>` runs to
    the end in strict mode; in lenient mode only its tag is dropped."""
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
    r"""Content of the closed, non-empty `\boxed{…}` that ends last; a box within it is unwrapped."""
    found = boxes(text)
    return found[-1].content if found else None


def answer_block(visible: str) -> str | None:
    """The text of the answer block, where there is exactly one and it is not empty."""
    if visible.count("<answer>") != 1 or visible.count("</answer>") != 1:
        return None
    start, end = visible.find("<answer>") + len("<answer>"), visible.find("</answer>")
    return visible[start:end].strip() or None if start <= end else None


def final_answer(completion: str, mode: Mode) -> str | None:
    """The final answer as text, or `None` where there is none; by the rules above, in their order."""
    visible = _own_turn(outside_think(completion, mode))
    if mode == "strict":
        block = answer_block(visible)
        return last_boxed(visible) if block is None else last_boxed(block) or block
    if (found := _from_blocks(visible)) is not None:
        return found
    visible = visible.replace("<answer>", " ").replace("</answer>", " ")
    for question in islice(_NEXT_QUESTION.finditer(visible), MOST_QUESTIONS):
        if (answered := _explicit(visible[: question.start()])) is not None:
            return answered
    return _read(visible)


def _own_turn(text: str) -> str:
    """The text up to the model's end-of-turn token: what follows it is no part of the completion."""
    for end in _END_OF_TURN.finditer(text):
        if text[: end.start()].strip():
            return text[: end.start()]
    return text


def _from_blocks(visible: str) -> str | None:
    """The content of the last answer block, or of all where they stand side by side and differ."""
    if "<answer>" not in visible:
        return None
    blocks = [match for match in _BLOCK.finditer(visible) if match[1].strip()]
    if not blocks:
        # A sampler that stops at "</answer>" takes it away.
        rest = visible.rpartition("<answer>")[2].strip()
        return rest if rest and "</answer>" not in rest and is_expression(rest) else None
    said = [trim(blocks[-1][1])]
    for earlier, later in zip(blocks[-2::-1], blocks[:0:-1], strict=True):
        if visible[earlier.end() : later.start()].strip():
            break
        said.append(trim(earlier[1]))
    if len(set(said)) > 1:
        return ", ".join(reversed(said))
    block = blocks[-1][1].strip()
    if found := boxes(block, lenient=True):
        return _joined(block, found)
    return block if is_expression(block) else _read(block) or block


def _read(visible: str) -> str | None:
    if (explicit := _explicit(visible)) is not None:
        return explicit
    whole = trim(visible)
    if is_expression(whole) or _LABELLED.fullmatch(whole) or _WORDS.fullmatch(whole):
        return whole
    return last_stated(visible)


def _explicit(text: str) -> str | None:
    """Rules 2 and 3."""
    found: list[tuple[int, str]] = []
    if boxed := [box for box in boxes(text, lenient=True) if not denied(text, box)]:
        found.append((boxed[-1].start, _joined(text, boxed)))
    for match in list(_HASHES.finditer(text))[:-MOST_MARKERS:-1]:
        if hashed := _after_hashes(match[1]):
            found.append((match.start(), hashed))
            break
    markers = sorted(
        (match for pattern in _MARKERS for match in pattern.finditer(text)), key=lambda match: match.end()
    )[: -MOST_MARKERS - 1 : -1]
    stated = words = None
    for marker in markers:
        if found and not marker["final"]:
            continue  # a box outranks a plain "the answer is"
        value = value_after(text, marker.end(), after_heading=marker[0].endswith("\n"))
        if value is None:
            continue
        if not _VALUE.search(value):  # "the final answer is verified": an answer only where there is no other
            words = words or value
            continue
        if marker["final"] and not (found and marker.start() < max(found)[0]):
            found.append((marker.start(), value))
            break
        stated = stated or value
        if not found:
            break
    return max(found)[1] if found else stated or words


def _joined(text: str, found: list[Span]) -> str:
    """The last box, with those before it that stand on the same line and are joined to it."""
    said = [found[-1].content]
    for earlier, later in zip(found[-2::-1], found[:0:-1], strict=True):
        between = text[earlier.end : later.start]
        if len(between) > 60 or "\n" in between or not _JOINT.fullmatch(between):
            break
        if earlier.content not in said:
            said.append(earlier.content)
    return ", ".join(reversed(said))


def _after_hashes(said: str) -> str | None:
    """The answer after `####`, or `None` where that was a heading: "#### Step 4", "#### 1. Set up"."""
    said = trim(said)
    if spans := maths(said):
        return spans[0].content if spans[0].start == 0 else None
    if is_expression(said):
        return said
    if re.match(r"[-−$\\(£€¥]{0,4}\d", said) and not _HEADING.match(said) and len(said.split()) <= 5:
        return said
    return None
