"""The answer that prose states: after a marker ("the answer is"), or last of all in the text."""

import re
from itertools import pairwise

from rewards.maths.spans import Span, bare_latex, is_expression, maths, number_words, numbers, trim

LONGEST_STATED = 600  # characters after a marker that are looked at
TAIL = 4000  # characters at the end of a text in which its last expression is looked for

_SENTENCE_END = re.compile(r"[.!?](?=[\s*]|$)|[。！？；]|\n\s*\n|\n(?=\s*(?:[-*]|\d+[.)])\s)|\n")
_FILLER = re.compile(
    r"(?:[\s:：*_>]|\\?\[?\s*$|(?:that|therefore|thus|then|simply|just|indeed|actually|exactly|equal(?:s)? to|"  # noqa: E501
    r"approximately|about|given by|is|are|given as|obtained as|option|choice|hence|the number|the value|the|"
    r"both|either|again|still|now|also|only|是|为|应该|等于)\b)*",
    re.IGNORECASE,
)
_NO_VALUE = re.compile(
    r"(?:not|wrong|incorrect|correct|right|clear|obvious|unclear|unknown|as follows|based|found|obtained|one of|"  # noqa: E501
    r"among|in the form|supposed|expected|required|needed|asked|yes we|given in|to be|being|a positive|an integer|"  # noqa: E501
    r"always|independent|unique|now|within|let|we|first|i|here|sure|step|since|using|this|there|it|see|below|"
    r"above|can|could|may|might|either of)\b",
    re.IGNORECASE,
)
_AND = re.compile(r"(?:[\s,;、]|\b(?:and|or)\b|和|或|或者|以及)*")
_FENCE = re.compile(r"```[ \t]*(?:python|py|cpp|c|java)\b.*?(?:```|\Z)|\[asy\].*?(?:\[/asy\]|\Z)", re.DOTALL)
_CUT_WORDS = frozenset(
    "the a an of is are was and or to in with that we so which by for from as be this it if then at on "  # noqa: SIM905
    "let since because when where has have can will would how first next now i our their its but not get "
    "gives find use using plus minus times".split()
)
_ENDS = tuple(".!?。！？)]}\"'*$")
_CUT_CHARACTERS = "=+-−*/^_({[,:;\\&<>~，、：≈×÷"
_LABEL_ONLY = re.compile(
    r"(?:\\(?:triangle|angle|overline|overrightarrow|vec|mathbf|mathrm|text)\s*)*\{?[A-Za-z](?:[A-Z]{0,3}|_\{?\w\}?|'*)\}?"
)
# "Thus Tim makes 120 dollars in 2 weeks": what follows a preposition describes the answer.
_CONTEXT = re.compile(
    r"(?:(?<!total )(?<!sum )(?<!cost )(?<!price )(?<!profit )(?<!average )(?<!balance )(?<!amount )(?<!score )"  # noqa: E501
    r"(?<!length )(?<!area )(?<!speed )(?<!value )(?<!answer )(?<!maximum )(?<!minimum )\bof|"
    r"\b(?:in|after|for|during|over|within|on|at|from|with|without|per|every|each|than|before|when|if|between|"
    r"that\s+(?:costs?|ha[sd]|have|is|are)|by|until|among|through|across|given|since|as|modulo|where|mod)|"
    r"(?<!need )(?<!needs )(?<!have )(?<!has )"
    r"(?<!had )(?<!able )(?<!going )(?<!needed )(?<!him )(?<!her )(?<!them )(?<!us )\bto(?:\s+[a-z]+)?)"
    r"(?:\s+(?:[a-z]+ing|\$?\d+\$?,?|and|or|the|a|an|his|her|their|its|all|these|those|first|next|last|another|about|only|just|other))*"
    r"\s*$",
    re.IGNORECASE,
)
_DENIED = re.compile(r"(?:\bnot|n't|≠|\\ne|不是)[\s$]*$", re.IGNORECASE)
_DENIED_AFTER = re.compile(
    r"\W{0,3}\s(?:is|was)\s(?:wrong|incorrect|false|impossible|not\s(?:right|correct|the|an?\s(?:\w+\s)?(?:answer|solution)))"
)
_GOES_ON = re.compile(r"\s*(?:times|plus|minus|(?:divided|multiplied)\s+by)\b", re.IGNORECASE)
_OPEN_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{(?:[^{}]|\{[^{}]*\})*\Z")
_THEN_VALUE = re.compile(r"\s*(?:is|are|equals|=|是|为)\s*(?=[-−$\\\d])")
_CHANGES = re.compile(
    r"\b(?:less|more|fewer|greater|smaller|larger) than|"
    r"\bat (?:least|most)|\b(?:not|twice|half|double)\b[^=]*$|"
    r"\b(?:negative|opposite|square|cube|reciprocal|inverse) of|[大小多少]于|不等于|超过|负",
    re.IGNORECASE,
)
_MODIFIER = re.compile(r"\s?-\s?[A-Za-z]")  # "the 8-point buck"
_CHOICE = re.compile(r"\b(?:is|it's|option|choice)\s+\(?([A-J])\)?\W*$")
_LINES = re.compile(r"\\(?:begin|end)\{(?:aligned|align|gathered|split|array)\*?\}(?:\{[rcl]*\})?")
_ROWS = re.compile(r"\\\\(?:\[[^\]]*\])?")


def denied(text: str, stated: Span) -> bool:
    """Whether the words beside a piece of a text say that it is not the answer."""
    before, at = text[max(0, stated.start - 12) : stated.start], stated.end + text.startswith("$", stated.end)
    return bool(_DENIED.search(before) or _DENIED_AFTER.match(text, at))


def value_after(text: str, position: int, *, after_heading: bool = False) -> str | None:
    """The value that is stated from `position` on, behind "the answer is" or the like; `None` if none is.

    Maths that comes first, with all that a comma or a word joins to it; else an expression or a number with
    its unit; else a word or two (`Evelyn`, `even`, `(C)`)."""
    said = text[position : position + LONGEST_STATED]
    said = said[_FILLER.match(said).end() :]  # type: ignore[union-attr]
    if not said or _NO_VALUE.match(said):
        return None
    spans = maths(said)
    stop = _SENTENCE_END.search(said)
    while stop and any(span.start < stop.start() < span.end for span in spans):
        stop = _SENTENCE_END.search(said, stop.end())
    if stop is None and position + LONGEST_STATED < len(text):
        return None
    sentence = said[: stop.start()] if stop else said
    inside = [span for span in spans if span.start < len(sentence)]
    if after_heading and inside and len(sentence[: inside[0].start].split()) > 3:
        return last_stated(sentence)
    if inside:
        first = [span for span in inside if not _label_only(span.content)] or inside
        if named := _THEN_VALUE.match(said, first[0].end):  # "the number of roots of $g(x)$ is 12"
            return value_after(said, named.end())
        return _group(said, inside, first[0])
    return _plain(sentence, whole=stop is not None or said.rstrip().endswith(_ENDS))


def _plain(sentence: str, *, whole: bool) -> str | None:
    sentence = trim(sentence)
    if not sentence or (not whole and _looks_cut(sentence)):
        return None
    if is_expression(sentence):
        return sentence
    found = numbers(sentence)
    if not found:
        return sentence if len(sentence.split()) <= 4 and len(sentence) <= 60 else None
    if found[0].start == 0 and "=" not in sentence:  # "18 dollars a day": the unit is part of the answer
        return _with_unit(sentence, found)
    if re.match(r"\(?[A-Z]\)", sentence):  # "(C) 15 apples"
        return sentence
    if _CHANGES.search(sentence[: found[-1].start]):  # "less than 5" is not 5
        return sentence
    _, equals, right = sentence.rpartition("=")
    if equals and (after := numbers(right)) and after[0].start <= 2:
        return _with_unit(right.strip(), numbers(right.strip()))
    return found[-1].content


def _with_unit(sentence: str, found: list[Span]) -> str:
    if (len(found) == 1 and len(sentence.split()) <= 4) or is_expression(sentence):
        return sentence
    joined = [found[0]]
    for span in found[1:]:
        if not _AND.fullmatch(sentence[joined[-1].end : span.start]):
            break
        joined.append(span)
    if _GOES_ON.match(sentence, joined[-1].end):  # "42 times 2" is not 42
        return sentence
    return ", ".join(span.content for span in joined)


def last_stated(text: str) -> str | None:
    """The last expression that a finished sentence of the text states: maths or a number."""
    text = text.replace("$\\$$", "\\$")  # `$\$$300`, money that its writer set in maths
    if _looks_cut(text):
        return None
    tail = _FENCE.sub(" ", _tail(text))
    spans = maths(tail)
    if not spans:
        spans = bare_latex(tail)
    outside = tail  # of the maths: that is blanked out
    for span in spans:
        outside = outside[: span.start] + "\x1f" * (span.end - span.start) + outside[span.end :]
    tokens = sorted([*spans, *numbers(outside)], key=lambda span: span.start)
    ends = [match.end() for match in _SENTENCE_END.finditer(outside)]
    for sentence_start, sentence_end in list(pairwise([0, *ends, len(outside)]))[::-1]:
        sentence = outside[sentence_start:sentence_end].strip()
        if sentence.endswith(("?", "？")) or sentence.startswith(("(", "Note")):
            continue
        inside = [token for token in tokens if sentence_start <= token.start < sentence_end]
        named = [token for token in inside if not _label_only(token.content)]
        telling = [token for token in named if not denied(tail, token)]
        if not tokens and (words := number_words(sentence)):
            return words[-1].content
        if not telling and (letter := _CHOICE.search(sentence)):
            return letter[1]
        if not telling:
            continue
        last = _main(tail, telling)
        return _group(tail, telling, last, backwards=True) if last in spans else last.content
    return None


def _tail(text: str) -> str:
    """The end of the text, from the start of a paragraph or at least a line on: never from within maths."""
    start = max(len(text) - TAIL, 0)
    breaks = (text.find(boundary, start) for boundary in ("\n\n", "\n"))
    return text[next((at for at in breaks if at >= 0), start) :] if start else text


def _main(text: str, tokens: list[Span]) -> Span:
    """The last expression of a sentence that is not in a phrase after a preposition."""
    for token in tokens[::-1]:
        if "=" in token.content:
            return token
        before = text[max(0, token.start - 60) : token.start]
        if not _CONTEXT.search(before) and not _MODIFIER.match(text, token.end):
            return token
    return tokens[-1]


def _group(text: str, spans: list[Span], chosen: Span, *, backwards: bool = False) -> str:
    """The content of `chosen` and of the spans that "and", "or" or a comma joins to it."""
    group = [chosen]
    at = spans.index(chosen)
    if backwards:
        for earlier in spans[:at][::-1]:
            if not _AND.fullmatch(text[earlier.end : group[0].start]) or not _parallel(earlier, group[0]):
                break
            group.insert(0, earlier)
    else:
        for later in spans[at + 1 :]:
            if not _AND.fullmatch(text[group[-1].end : later.start]):
                break
            group.append(later)
    contents = [_one(span.content) for span in group]
    after = text[group[-1].end : group[-1].end + 12].lstrip()
    percent = "%" if len(group) == 1 and re.match(r"\\?%|percent\b", after) else ""
    return ", ".join(dict.fromkeys(contents)) + percent


def _parallel(first: Span, second: Span) -> bool:
    """Whether two formulas are values side by side, `x = 2` and `x = 3`, and not steps of a derivation."""
    shapes = []
    for content in (first.content, second.content):
        left, equals, right = content.partition("=")
        if equals and (not _label_only(left) or "=" in right):
            return False
        shapes.append("=" if equals else "<" if re.search(r"[<>]|\\[lg]eq?\b|\\in\b", content) else "")
    return shapes[0] == shapes[1]


def _one(content: str) -> str:
    """The last line of a display, without alignment marks and the full stop."""
    content = _LINES.sub("", content) if content.startswith("\\begin") else content
    if "\\begin" not in content:
        rows = [row for row in _ROWS.split(content.replace("&", " ")) if row.strip()]
        content = rows[-1] if rows else content
    return content.strip().rstrip(".,;").strip()


def _label_only(content: str) -> bool:
    """Whether it only names something: `x`, `ABC`, `\\triangle ABC`."""
    return _LABEL_ONLY.fullmatch(content.strip().strip("$").strip()) is not None


def _looks_cut(text: str) -> bool:
    """Whether the text breaks off in the middle of a sentence or a formula."""
    text = text.rstrip()
    brackets = [bracket in "([" for bracket in text.rpartition("\n")[2] if bracket in "()[]"]
    if (
        not text
        or (2 * sum(brackets) > len(brackets) and text[-1] not in ".!?")
        or (text[-1] in _CUT_CHARACTERS and not text.endswith(("**", "\\)", "\\]", "--")))
    ):
        return True
    tail = text[-TAIL:]
    if tail.rfind("\\[") > tail.rfind("\\]") or tail.rfind("\\(") > tail.rfind("\\)"):
        return True
    if tail.count("$$") % 2 or _OPEN_BOX.search(tail, max(tail.rfind("\\boxed"), tail.rfind("\\fbox"), 0)):
        return True
    last = re.search(r"([A-Za-z]+)$", tail)
    return last is not None and last[1].lower() in _CUT_WORDS and len(tail) > len(last[1])
