"""Where the mathematics stands in a text: boxes, maths between delimiters, numbers in prose.

Nothing here knows what an answer is (`extract` does). All of it is linear in the text, and every
pattern is bounded, for the text is whatever a model wrote.
"""

import re
from dataclasses import dataclass

from rewards.maths.notation import normalise
from rewards.maths.values.expression import parse
from rewards.maths.values.numbers import WORDS

LONGEST_SPAN = 2000  # characters between two delimiters

_BOX = re.compile(
    r"(?P<open>(?:\\boxed|\\fbox|\x08oxed|(?<![A-Za-z\\])boxed)\s{0,3}\{)"  # \x08: "\b" read as an escape
    r"|\\(?:boxed|fbox)\s{0,3}(?P<bare>[0-9][0-9.,/]{0,40}|[A-Za-z](?![A-Za-z]))"
    r"|\\.|[{}]",
    re.DOTALL,
)
_INNER_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")
_PLACEHOLDER = re.compile(
    r"(?:\\text\{)?[\s<\[(]*(?:your |the |final )*(?:answer|result)(?: here)?[\s>\])]*\}?|[.…\s]+|\\[lc]?dots|_+",  # noqa: E501
    re.IGNORECASE,
)
_END_OF_BROKEN_BOX = re.compile(r"\$|\\\)|\\\]")
_COMMAND = re.compile(
    r"\\(?:begin|end)\{\w+\*?\}(?:\{[lcr|]*\})?"
    r"|\\(?:text|textbf|textrm|textit|mathrm|mbox|mathbf|operatorname)\s*\{[^{}]*\}|\\[A-Za-z]+|\\."
)
_LONG_WORD = re.compile(r"[A-Za-z]{2,}|[^\W\d_A-Za-z]{2,}")
_MATHS_WORDS = frozenset(
    "sin cos tan cot sec csc log ln exp sqrt pi lim max min gcd lcm mod inf oo infty infinity arcsin "  # noqa: SIM905
    "arccos arctan and or".split()
)
_SHORT_WORDS = frozenset(
    "is are was be of in to so we by at it the a an as if or and for has had get got can how our his her "  # noqa: SIM905
    "its not no yes let set per all any one two six ten but cm mm km kg lb ft mi hr am pm st nd rd th".split()
)
_OPENER = re.compile(r"\$\$|\\\[|\\\(|\\begin\{(?P<env>(?:align|equation|gather|aligned)\*?)\}|\\\$|\$")
_PLAIN_NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|(?<![\d.])\.\d+)"
_NUMBER = re.compile(
    # A minus sign counts where it does not join two terms: "= -3", "is -3", but not "5 - 3" or "2010-2015".
    rf"(?<![A-Za-z0-9_.\\])(?:(?<![\d)\]}}])(?<![\d)\]}}] )[-−–]\s?)?(?:\\?[$£€¥]\s?)?{_PLAIN_NUMBER}"
    rf"(?:\s?/\s?\d+|\s\d+/\d+|:\d+)?(?:\s?√\s?\(?\d+\)?)?(?:\s?(?:\\?%|π|percent\b))?"
)
_LABELS = re.compile(
    r"(?:\b(?:step|part|equation|eq|figure|case|option|problem|example|line|question|method|solution|rule|"
    r"section|chapter|point|page|note|item|statement|condition|theorem|lemma|row|column|grade|day|stage|and)"
    r"s?\.?|第|[([]|^|\n)\s*#?\s*$",
    re.IGNORECASE,
)


_ATOM = (
    r"(?:\\[A-Za-z]+|\{(?:[^{}]|\{[^{}]*\}){0,200}\}|\d+(?:\.\d+)?|[-+*/^_()|=<>]|"
    r"(?<![A-Za-z])(?![aAI] )[A-Za-z](?![A-Za-z]))"
)
_BARE = re.compile(rf"{_ATOM}(?: ?{_ATOM}){{0,80}}")
_BARE_SIGN = re.compile(r"\\(?:[dt]?frac|sqrt|pi|binom|cdot|times|log|ln|sin|cos|tan)(?![A-Za-z])")
_NUMBER_WORD = re.compile(
    rf"\b(?:{'|'.join(sorted(set(WORDS) - {'one'}, key=len, reverse=True))})\b(?! of)", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of a text: `text[start:end]`, with `content` between its delimiters."""

    start: int
    end: int
    content: str


def boxes(text: str, *, lenient: bool = False) -> list[Span]:
    r"""The outermost closed, non-empty `\boxed{…}`, in order; boxes within them are unwrapped.

    With `lenient`, a last box that its delimiter closes but no brace does, `$\boxed{5$`, counts too; one that
    the end of the text cut off never does."""
    found: list[Span] = []
    stack: list[tuple[int, int]] = []  # of each open brace: where its box begins and its content, or -1, -1
    for match in _BOX.finditer(text):
        if match["open"]:
            stack.append((match.start(), match.end()))
        elif match["bare"]:
            found.append(Span(match.start(), match.end(), match["bare"].rstrip(".,/")))
        elif match[0] == "{":
            stack.append((-1, -1))
        elif match[0] == "}" and stack:
            start, inner = stack.pop()
            if start >= 0:
                content = text[inner : match.start()].strip()
                while found and found[-1].start > start:
                    nested = found.pop()
                    if not content.strip("{} "):
                        content = nested.content
                if content and not _PLACEHOLDER.fullmatch(content):
                    found.append(Span(start, match.end(), _unwrapped(content)))
    if lenient:
        broken = [frame for frame in stack if frame[0] >= (found[-1].end if found else 0)]
        if broken and (span := _broken_box(text, *broken[-1])):
            found.append(span)
    return found


def _unwrapped(content: str) -> str:
    """Without the boxes within it; `{5}` as 5, `{5}+x` as it is."""
    if "box" not in content:
        return content
    content = _INNER_BOX.sub("", content).strip()
    single = content[:1] == "{" and content[-1:] == "}" and "{" not in content[1:] and "}" not in content[:-1]
    return content[1:-1].strip() if single else content


def _broken_box(text: str, start: int, inner: int) -> Span | None:
    stop = _END_OF_BROKEN_BOX.search(text, inner, inner + 200)
    content = text[inner : stop.start()].strip() if stop else ""
    if not content or "\n" in content or not any(character.isalnum() for character in content):
        return None
    missing = content.replace("\\{", "").count("{") - content.replace("\\}", "").count("}")
    return Span(start, stop.start() if stop else inner, content + "}" * max(missing, 0))


def is_expression(text: str) -> bool:
    """Whether `text` is one line of mathematics rather than prose: no word but the names of functions."""
    text = text.strip()
    if not text or len(text) > 500 or "\n" in text:
        return False
    bare = _COMMAND.sub(" ", text.strip("$"))
    words = [word for word in _LONG_WORD.findall(bare) if word.lower() not in _MATHS_WORDS]
    if any(len(word) > 3 or word.lower() in _SHORT_WORDS for word in words):
        return False
    if words and (not re.search(r"[-+*/^=]", bare) or parse(normalise(text)) is None):
        return False  # letters side by side are a product in `ac + bd`
    return any(character.isalnum() for character in text)


def maths(text: str) -> list[Span]:
    r"""What stands between `$ $`, `$$ $$`, `\( \)`, `\[ \]` or in an equation environment, in order.

    A dollar sign that is money (`$18 and $5`, `\$18`) opens nothing."""
    found: list[Span] = []
    position = 0
    while opener := _OPENER.search(text, position):
        token, start = opener[0], opener.end()
        position = start
        if token == "\\$":
            continue
        if token == "$":
            # "2600$": money behind its number
            close = -1 if text[max(0, opener.start() - 1)].isdigit() else _closing_dollar(text, start)
            end = close + 1
        else:
            closing = {"$$": "$$", "\\[": "\\]", "\\(": "\\)"}.get(token) or f"\\end{{{opener['env']}}}"
            close = text.find(closing, start, start + LONGEST_SPAN)
            end = close + len(closing)
        if close < 0:
            continue
        if content := text[start:close].strip():
            found.append(Span(opener.start(), end, content))
        position = end
    return found


def _closing_dollar(text: str, start: int) -> int:
    """The `$` that closes the maths opened before `start`, or -1 where that one was a currency's."""
    close = text.find("$", start, start + LONGEST_SPAN)
    while close >= 0 and text[close - 1] == "\\":
        close = text.find("$", close + 1, start + LONGEST_SPAN)
    if close <= start or "\n\n" in text[start:close]:
        return -1
    content = text[start:close]
    money = content[0].isdigit() and (text[close + 1 : close + 2].isdigit() or content[-1].isspace())
    return -1 if money else close


def trim(text: str) -> str:
    """Without the white space, emphasis and full stops around it."""
    return text.strip().strip("*").strip().rstrip(".。,，").strip("*").strip()


def bare_latex(text: str) -> list[Span]:
    """LaTeX that stands in prose without delimiters."""
    found = (match for match in _BARE.finditer(text) if _BARE_SIGN.search(match[0]))
    return [Span(match.start(), match.end(), match[0].strip(" .,")) for match in found]


def number_words(text: str) -> list[Span]:
    """`eight`, `twenty-one`, but not `one`."""
    return [Span(match.start(), match.end(), match[0]) for match in _NUMBER_WORD.finditer(text)]


def numbers(text: str) -> list[Span]:
    """Numbers in prose, with sign, currency, fraction and percent; not those that label a step or a part."""
    found = (match for match in _NUMBER.finditer(text) if not _is_label(text, match))
    return [Span(match.start(), match.end(), match[0].strip()) for match in found]


def _is_label(text: str, match: re.Match[str]) -> bool:
    found = _LABELS.search(text[max(0, match.start() - 16) : match.start()])
    if found is None:
        return False
    word = found[0].strip().lower()
    after = text[match.end() : match.end() + 2]
    if word in ("", "(", "[", "#"):
        # "1. First", "(1)", "[1]"; but "(18 dollars)" and a line "18" are numbers
        more = text[match.end() : match.end() + 40].strip(" \n.*$)")
        return bool(re.match(r"[.):\]]\s|[\])]", after + " ")) and bool(word or more)
    return word != "and"
