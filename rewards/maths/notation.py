r"""One notation for what is written alike: the strings that answers are compared as.

`normalise` removes what carries no value (spacing, delimiters, `\left`, `\dfrac`, text wrappers, degree
signs, ordinal endings, full-width digits); `split_unit` takes a unit off an expression.
"""

import re
from functools import lru_cache

# Full-width ASCII to ASCII. Not NFKC: that would turn x² into x2.
_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {
    0x3000: " ", 0x2212: "-", 0x2013: "-", 0x3002: ".", 0x00D7: "\\times ", 0x03C0: "\\pi ",
    0x221E: "\\infty ", 0x00B0: "^\\circ", 0x00A0: " ", 0x202F: " ", 0x2009: " ", 0x200B: "",
    0x00B1: "\\pm ", 0x3001: ",", 0x2264: "\\le ", 0x2265: "\\ge ", 0x222A: "\\cup ", 0x2208: "\\in ",
    0x221A: "\\sqrt", 0x00B7: "\\cdot ", 0x00F7: "/", 0x00B2: "^2", 0x00B3: "^3", 0x00BD: "\\frac{1}{2}",
    0x00BC: "\\frac{1}{4}", 0x00BE: "\\frac{3}{4}", 0x2260: "\\ne ", 0x2248: "\\approx ", 0x0000: "",
}  # fmt: skip
_SPACING = re.compile(
    r"\\\\|\\[!,;:>]|\\ |\\q?quad\b|~|\\(?:displaystyle|textstyle|limits|left|right|[Bb]ig{1,2}[lrm]?)(?![A-Za-z])"  # noqa: E501
)
_DEGREES = re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree\b|\\circ\b")
_ORDINAL = re.compile(
    r"(?<=\d)\s*\^?\s*\{?\s*(?:\\(?:text|mathrm|textrm|rm|mbox)\s*\{?\s*)?(?:st|nd|rd|th)\b\s*\}?\}?"
)
_TEXT = re.compile(
    r"\\(?:(?:text|math)(?:bf|rm|it|sf)|text|bf|rm|it|mbox|hbox|operatorname|emph|bm)\s*\{([^{}]*)\}"
)
_OLD_FONT = re.compile(r"\\(?:bf|rm|it|mathrm)(?![A-Za-z])")
_UNIT_TEXT = re.compile(r"\s((?:[A-Za-z]{2,}+\.?\s*+){1,4})(?:\^?\s*\{?[23]\}?)?\s*$")
_SHORT_UNITS = frozenset("cm mm km ft in mi yd kg lb mg ml oz hr cu sq".split())  # noqa: SIM905
_JOINING = frozenset(
    "and or to of over mod bmod choose if for million billion thousand percent sin cos tan log".split()  # noqa: SIM905
)
_FRAC_BARE = re.compile(r"\\frac\s*(?:(\d)\s*(\d)|(\d)\s*(\{[^{}]*\})|(\{[^{}]*\})\s*(\d))")
_SQRT_BARE = re.compile(r"\\sqrt\s*(?:(\d|[a-z])|\((\d+)\))")
_BRACED_POWER = re.compile(r"\^\s*\{\s*([0-9A-Za-z])\s*\}")
_SPACES = re.compile(r"\s+")
_CHOICE = re.compile(r"\(?\s*([A-Z])\s*\)?")
_DELIMITERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("`", "`"))


@lru_cache(maxsize=8192)
def normalise(text: str) -> str:
    """One notation for what is written alike: no spacing, delimiters or text wrappers, ASCII digits."""
    text = _SPACES.sub(" ", text.translate(_WIDTH)).strip()
    for start, end in _DELIMITERS * 2:
        if text.startswith(start) and text.endswith(end) and len(text) > len(start) + len(end):
            inner = text[len(start) : -len(end)]
            text = text if start in inner.replace("\\$", "") else inner.strip()
    text = text.replace("\\$", "").replace("\\%", "%").replace("\\lbrace", "\\{").replace("\\rbrace", "\\}")
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)
    text = text.replace("$", " ").strip()  # money, or the delimiters of "$1$ and $2$"
    text = text.lstrip("£€¥") if text[:1] in "£€¥" else text.replace("-€", "-").replace("-£", "-")
    text = _SPACES.sub(" ", _SPACING.sub(_respace, text))  # patterns below are slow on long runs of spaces
    text = _ORDINAL.sub("", _DEGREES.sub("", text))
    text = _OLD_FONT.sub(" ", _TEXT.sub(r" \1 ", text))
    text = _FRAC_BARE.sub(_brace, text)
    text = _SQRT_BARE.sub(lambda match: f"\\sqrt{{{match[1] or match[2]}}}", text)
    text = _BRACED_POWER.sub(r"^\1", text)
    text = _SPACES.sub(" ", text).strip().rstrip(".,").strip()
    choice = _CHOICE.fullmatch(text)
    return choice[1] if choice else text


_JUNK = r"(?:[@?#`\"|&\u2026\u2192\ufffd\u2600-\u27bf\U0001f000-\U0001faff]|\\(?=\s*\d))"
_JOINED_BY_JUNK = re.compile(rf"\d\s*{_JUNK}(?:\s|{_JUNK})*\d")
_BESIDE = re.compile(r"\d[ ]+\d")
_GROUPS = re.compile(r"(?<![\d.])\d{1,3}(?: \d{3})+(?!\d| \d)")
_MIXED = re.compile(r"(?<![\d.])\d+ \d+ ?/ ?\d+")


def unjoined(text: str) -> str:
    """Why a normalised `text` is no expression: two numbers in it that nothing joins; "" if it may be one.

    Parsers read `10@1` as 10, and `1 2` as 3: what follows the first number is lost, or taken for a mixed
    number. A matrix has numbers side by side, digits may come in threes, and `2 1/2` is a number.
    """
    if "\\begin" in text:
        return ""
    if "\ufffd" in text:
        return "a broken character"
    if _JOINED_BY_JUNK.search(text):
        return "two numbers joined by no operation"
    rest = _MIXED.sub(" x ", _GROUPS.sub(" x ", text))
    return "two numbers side by side" if _BESIDE.search(rest) else ""


def compact(text: str) -> str:
    """Without spaces, for comparing as written."""
    return text.replace(" ", "").replace("{,}", ",")


def split_unit(text: str) -> tuple[str, str]:
    r"""A normalised expression less the unit that follows it, `12\sqrt{13} feet`, and the unit's words.

    Words that join or change the number (`or`, `million`) are no unit, and neither are variables (`2 xy`).
    """
    match = _UNIT_TEXT.search(text)
    if match is None:
        return text, ""
    head, words = text[: match.start()].rstrip(), match[1].lower().replace(".", " ").split()
    if not re.search(r"[0-9a-zA-Z})\]]$", head) or not re.search(r"\d|\\pi|\\sqrt", head):
        return text, ""
    if _JOINING.intersection(words) or any(len(word) < 3 and word not in _SHORT_UNITS for word in words):
        return text, ""
    return head, " ".join(words)


def _respace(match: re.Match[str]) -> str:
    if match[0] == "\\\\":  # a new row of a matrix; what follows it is not `\ `
        return match[0]
    return " " if match[0] in ("\\ ", "~") or "quad" in match[0] else ""


def _brace(match: re.Match[str]) -> str:
    top, bottom = (group.strip("{}") for group in match.groups() if group)
    return f"\\frac{{{top}}}{{{bottom}}}"
