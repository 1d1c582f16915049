r"""One notation for what is written alike: the strings that answers are compared as.

`normalise` removes what carries no value (delimiters, `\left`, `\dfrac`, text wrappers, full-width digits)
and gives each sign one name. It never joins what stood apart: a character between two digits stays, as itself
or as a space, unless it separates thousands."""

import re
from functools import lru_cache

# Full-width ASCII to ASCII. Not NFKC: that would turn x² into x2.
_WIDTH: dict[int, int | str] = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_WIDTH |= dict.fromkeys((0x3000, 0x00A0, 0x202F, 0x2009, 0x200B, 0xFEFF), " ")
_WIDTH |= {
    ord(sign): text
    for sign, text in {
        "−": "-", "–": "-", "‑": "-", "。": ".", "、": ",", "×": "\\times ", "·": "\\cdot ", "⋅": "\\cdot ",
        "÷": "/", "⁄": "/", "±": "\\pm ", "∞": "\\infty ", "°": "\\degree ", "√": "\\sqrt", "≤": "\\le ",
        "≥": "\\ge ", "≠": "\\ne ", "≈": "\\approx ", "∪": "\\cup ", "∈": "\\in ", "∅": "\\emptyset ",
        "ℝ": "\\R ", "¬": "\\neg ", "…": "\\ldots ", "½": "\\frac{1}{2}", "¼": "\\frac{1}{4}",
        "¾": "\\frac{3}{4}", "π": "\\pi ", "θ": "\\theta ", "α": "\\alpha ", "β": "\\beta ", "λ": "\\lambda ",
        **{power: f"^{i}" for i, power in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
    }.items()
}  # fmt: skip
_CIRCLED = re.compile(r"[\u2460-\u2473](?:[\s,]*[\u2460-\u2473])*")  # choices, side by side
# What a JSON or Python string makes of a single backslash: "\frac" is a form feed and "rac".
_ESCAPED = re.compile(r"\x0c(?=rac)|\x08(?=inom|oxed)|\t(?=imes|ext|frac|an\b|heta)|\r(?=ight)")
_LETTER = {"\x0c": "\\f", "\x08": "\\b", "\t": "\\t", "\r": "\\r"}
_IGNORED = re.compile(
    r"\\(?:displaystyle|textstyle|limits|left|right|[Bb]ig{1,2}[lrm]?)(?![A-Za-z])\.?|(?<=,)\s*\\!\s*|\\!|"
    r"\\(?:text)?color\s*\{[a-z]+\}|\\(?:large|Large|LARGE|huge|Huge)(?![A-Za-z])"
)
_SPACING = re.compile(r"\\\\|\\[,;:> ]|\\q?quad(?![A-Za-z])|~")
_SYNONYMS = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"\\(?:[dtc]|nice)frac(?![A-Za-z])", r"\\frac"),
        (r"\\[dt]binom(?![A-Za-z])", r"\\binom"),
        (r"\\l(?:eqslant|eqq|eq)(?![A-Za-z])|<=", r"\\le "),
        (r"\\g(?:eqslant|eqq|eq)(?![A-Za-z])|>=", r"\\ge "),
        (r"\\neq(?![A-Za-z])|\\not\s*=|!=", r"\\ne "),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"\\[lr]?vert(?![A-Za-z])", "|"),
        (r"\\lbrace(?![A-Za-z])", r"\\{"),
        (r"\\rbrace(?![A-Za-z])", r"\\}"),
        (r"\\lbrack(?![A-Za-z])", "["),
        (r"\\rbrack(?![A-Za-z])", "]"),
        (r"\\(?:mathbb|Bbb|mathbf)\s*\{?\s*R\s*\}?(?![A-Za-z])", r"\\R "),
        (r"\\varnothing(?![A-Za-z])", r"\\emptyset "),
        (r"\\(?:dots|cdots|dotsc)(?![A-Za-z])", r"\\ldots "),
        (r"(?<=\d) ?x ?(?=10 ?\^)", r"\\times "),
        (r"\{([^{}]+)\\choose([^{}]+)\}", r"\\binom{\1}{\2}"),
        (r"\\\{\s*\\\}", r"\\emptyset "),
        (r"^ ?(?:all )?real numbers ?$", r"\\R"),
        (r"^ ?[Nn]o (?:real )?solutions?[ .]*$", r"\\emptyset"),
        (r"\\langle(?![A-Za-z])", "("),
        (r"\\rangle(?![A-Za-z])", ")"),
        (r"\\(?:approxeq|simeq)(?![A-Za-z])|\\doteq(?![A-Za-z])", r"\\approx "),
        (r"(?<=[\w)])\*\*(?=[\w(-])", "^"),
        (
            r"[\[(]?\s*\\begin\{array\}\s*\{[lcr|]*\}(.*?)\\end\{array\}\s*[\])]?",
            r"\\begin{pmatrix}\1\\end{pmatrix}",
        ),
        (r"^\((\\begin\{pmatrix\}.*\\end\{pmatrix\})\)$", r"\1"),
        (r"\\dot\{?(\d)\}?", r"\\overline{\1}"),
        (r"(?:\^\s*\{?\s*\\circ\s*\}?|(?<=\d)\s*\\circ\b)", r"\\degree "),
        (r"(?<=[\d}])\s*degrees?\b(?!\s*[a-z])", r"\\degree "),
        (r"\\degree\s*([CF])\b", r" degree\1 "),
        (r"\\frac\{ ?([a-z]{2,}) ?\}\{ ?([a-z]{2,}) ?\}$", r" \1/\2"),
        (r"\b([ap])\.\s?m\b\.?", r"\1m"),
        (r"(\.\d+)(?:\\ldots|\.{3,})\s*$", r"\1"),
    )
]
_ORDINAL = re.compile(
    r"(?<=\d)\s*\^?\s*\{?\s*(?:\\(?:text|mathrm|textrm|rm|mbox)\s*\{?\s*)?(?:st|nd|rd|th)\b\s*\}?\}?(?!\s*\d)"
)
_TEXT = re.compile(
    r"\\(?:(?:text|math)(?:bf|rm|it|sf|normal|cal)|text|bf|rm|it|mbox|hbox|operatorname|emph|bm|boldsymbol|underline)\s*"
    r"\{([^{}]*)\}"
)
_APART_IN_BOLD = re.compile(r"\\(?:mathbf|boldsymbol)\{(\d(?: \d)+)\}")  # how some bodies set `20`
_TWICE_ESCAPED = re.compile(r"\\(?=\\[a-z]{2})")
_OLD_FONT = re.compile(r"\\(?:bf|rm|it|mathrm)(?![A-Za-z])")
_THOUSANDS = re.compile(r"(?<![\d._^])\d{1,3}(?: \d{3})+(?!\d| \d)")
_DECORATION = re.compile(r"(?:[\s.,;]|\\(?=[\s.,;]|$)|[\u2600-\u27bf\U0001f000-\U0001faff\ufe0f])+$")
_SPACES = re.compile(r"\s+")
_APART = re.compile(r"(?<!\d) | (?!\d)")
_DELIMITERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("`", "`"))


@lru_cache(maxsize=8192)
def normalise(text: str) -> str:
    """One notation for what is written alike: no delimiters or text wrappers, one name for each sign."""
    if text.isascii() and text.isdigit():
        return text
    text = _ESCAPED.sub(lambda match: _LETTER[match[0]], text)
    if "\\begin" not in text:
        text = _TWICE_ESCAPED.sub("", text)
    text = _CIRCLED.sub(lambda found: ", ".join(str(ord(c) - 0x245F) for c in found[0] if c > "\u245f"), text)
    text = _SPACES.sub(" ", text.translate(_WIDTH)).strip()
    for start, end in _DELIMITERS * 2:
        if text.startswith(start) and text.endswith(end) and len(text) > len(start) + len(end):
            inner = text[len(start) : -len(end)]
            text = text if start in inner.replace("\\$", "") else inner.strip()
    text = text.replace("\\$", "").replace("\\%", "%")
    text = text.replace("$", " ").strip()  # money, or the delimiters of "$1$ and $2$"
    text = text.lstrip("£€¥") if text[:1] in "£€¥" else text.replace("-€", "-").replace("-£", "-")
    # Patterns below are slow on long runs of spaces.
    text = _SPACES.sub(" ", _SPACING.sub(_respace, _IGNORED.sub("", text)))
    text = _APART_IN_BOLD.sub(lambda match: match[1].replace(" ", ""), text)
    text = _OLD_FONT.sub(" ", _TEXT.sub(r" \1 ", _ORDINAL.sub("", text)))
    for pattern, name in _SYNONYMS:
        text = pattern.sub(name, text)
    text = _DECORATION.sub("", _SPACES.sub(" ", text)).strip()
    text = _THOUSANDS.sub(lambda match: match[0].replace(" ", ""), text)
    return text


def compact(text: str) -> str:
    """Without spaces but between digits, for comparing as written."""
    return _APART.sub("", text).replace("{,}", ",")


def _respace(match: re.Match[str]) -> str:
    return match[0] if match[0] == "\\\\" else " "  # a new row of a matrix; what follows it is not `\\ `
