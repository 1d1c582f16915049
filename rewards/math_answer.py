"""Whether two mathematical answers are the same: a fast exact path, and math-verify for the rest.

`quick_grade` settles numbers (integers, decimals, fractions, mixed numbers, thousands separators, percent,
simple units, full-width digits), equal notation, choices and words, in microseconds. What is left goes to
math-verify in a killable child (`rewards.equivalence`): its own time-out needs `signal.alarm`, which fails
off the main thread, so it is off and the worker pool holds the clock.

Three outcomes: 1, 0, or `None` where the verifier failed (the gold does not parse; time or memory ran out).

Where graders differ, this one says: brackets matter, `(2,\\infty)` is not `[2,\\infty)`; a list is equal to a
list of as many members; a unit may be left out but not be a different one; `50\\%` equals 50 and 0.5, while
100 without a sign is not 1; a decimal equals a fraction that rounds to it where it has six digits or more.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from rewards.outcome import Outcome
from rewards.workers import DEFAULT_LIMIT_S, Memo, TaskFailed, WorkerPool, shared_pool

LONGEST_ANSWER = 2000  # characters; longer ones are not answers, and would only cost parsing time

_results: Memo[Outcome] = Memo(size=16384, keep=lambda outcome: outcome.value is not None)

# Full-width ASCII to ASCII. Not NFKC: that would turn x² into x2.
_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {
    0x3000: " ", 0x2212: "-", 0x2013: "-", 0x3002: ".", 0x00D7: "\\times ", 0x03C0: "\\pi ",
    0x221E: "\\infty ", 0x00B0: "^\\circ", 0x00A0: " ", 0x202F: " ", 0x2009: " ", 0x200B: "",
    0x00B1: "\\pm ", 0x3001: ",",
}  # fmt: skip
_SPACING = re.compile(
    r"\\\\|\\[!,;: ]|\\q?quad\b|~|\\(?:displaystyle|textstyle|limits|left|right|big|Big|bigl|bigr)\b"
)
_DEGREES = re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree\b|\\circ\b")
_ORDINAL = re.compile(r"(?<=\d)\s*\^?\{?(?:\\(?:text|mathrm|textrm)\{)?(?:st|nd|rd|th)\b\}?\}?")
_TEXT = re.compile(
    r"\\(?:text|textbf|textrm|textit|mathrm|mathbf|mathit|rm|bf|mbox|operatorname)\s*\{([^{}]*)\}"
)
_FRAC_BARE = re.compile(r"\\frac\s*(?:(\d)\s*(\d)|(\d)\s*(\{[^{}]*\})|(\{[^{}]*\})\s*(\d))")
_SPACES = re.compile(r"\s+")
_CHOICE = re.compile(r"\(?([A-Z])\)?")
_ASSIGNED = re.compile(r"[A-Za-z](?:\([a-z]\))?\s*=\s*([^=]+)")

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d*)?|\.\d+)"
_NUMBER = re.compile(
    rf"""(?P<sign>[+-]?)\s*(?:
        (?P<whole>\d+)?\s*\\frac\{{\s*(?P<top>-?{_DIGITS})\s*\}}\{{\s*(?P<bottom>{_DIGITS})\s*\}}
      | (?:(?P<whole2>\d+)\s+)?(?P<top2>{_DIGITS})\s*/\s*(?P<bottom2>{_DIGITS})
      | (?P<decimal>{_DECIMAL})
        (?:\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*\{{?\s*(?P<power>[+-]?\d{{1,4}})\s*\}}?|[eE](?P<power2>[+-]?\d{{1,3}}))?
    )\s*(?P<percent>\\?%)?""",
    re.VERBOSE,
)
_UNIT = re.compile(r"\s*((?:[A-Za-z]+(?:\s*\^?\s*\{?[23]\}?)?[./\s]*){1,5})$")
# After a number these are not units: they change it, or join it to another.
_NOT_UNITS = frozenset(
    "or and to of over out point half third quarter hundred thousand million billion trillion dozen times "  # noqa: SIM905
    "plus minus e i pi x y z n k a b c mod sqrt".split()
)
_UNIT_NAMES = {
    alias: names.split()[0]
    for names in (
        "mm millimeter millimeters", "cm centimeter centimeters centimetres", "m meter meters metre metres",
        "km kilometer kilometers", "in inch inches", "ft foot feet", "yd yard yards", "mi mile miles",
        "s sec second seconds", "min minute minutes", "h hr hour hours", "day days", "week weeks",
        "g gram grams", "kg kilogram kilograms", "lb pound pounds", "cent cents", "dollar dollars",
        "degree degrees", "rad radian radians",
    )
    for alias in names.split()
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Number:
    """A plain number as it was written."""

    value: Fraction
    digits: int | None  # decimal places, where it is written with a point and no percent sign
    percent: bool
    unit: str


def grade_math(
    gold: str, answer: str, *, pool: WorkerPool | None = None, timeout_s: float = DEFAULT_LIMIT_S
) -> Outcome:
    """1 where `answer` equals `gold`, 0 where it does not, `None` where that could not be found out.

    Args:
        gold: The right answer, text or LaTeX, as the data set gives it.
        answer: The answer that was extracted from a completion.
        pool: Where math-verify runs; default the process's shared pool.
        timeout_s: Wall clock for it, seconds.
    """
    outcome = quick_grade(gold, answer)
    if outcome is not None:
        return outcome
    return _results.get((gold, answer), lambda: _slow_grade(gold, answer, pool or shared_pool(), timeout_s))


def _slow_grade(gold: str, answer: str, pool: WorkerPool, timeout_s: float) -> Outcome:
    task = {"op": "math", "gold": normalise(gold), "answer": normalise(answer), "cpu_s": timeout_s + 5}
    try:
        reply = pool.call(task, timeout_s)
    except TaskFailed as failure:
        return Outcome(None, str(failure), answer)
    return Outcome(reply["value"], reply["detail"], answer)


def quick_grade(gold: str, answer: str) -> Outcome | None:
    """The verdict where it is certain without algebra, else `None`."""
    if not gold.strip():
        return Outcome(None, "the gold answer is empty", answer)
    if len(answer) > LONGEST_ANSWER:
        return Outcome(0.0, f"answer longer than {LONGEST_ANSWER} characters", answer)
    want, got = normalise(gold), normalise(answer)
    if want == got or _compact(want) == _compact(got):
        return Outcome(1.0, "equal as written", answer)
    if not got:
        return Outcome(0.0, "empty answer", answer)
    a, b = _number(want), _number(got)
    if a and b:
        same = _equal_numbers(a, b)
        return Outcome(float(same), "equal numbers" if same else "different numbers", answer)
    if _is_words(want):
        same = _compact(want).casefold() == _compact(got).casefold()
        return Outcome(float(same), "equal words" if same else "different words", answer)
    return None


@lru_cache(maxsize=8192)
def normalise(text: str) -> str:
    """One notation for what is written alike: no spacing, delimiters or text wrappers, ASCII digits."""
    text = text.translate(_WIDTH).strip()
    for start, end in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if text.startswith(start) and text.endswith(end) and len(text) > len(start) + len(end):
            inner = text[len(start) : -len(end)]
            text = text if start in inner.replace("\\$", "") else inner.strip()
    text = text.replace("\\$", "").replace("dfrac", "frac").replace("tfrac", "frac").replace("\\%", "%")
    if text.startswith("$") and text.count("$") == 1:
        text = text[1:]  # dollars, the money
    text = _SPACING.sub(_respace, text)
    text = _ORDINAL.sub("", _DEGREES.sub("", text))
    text = _FRAC_BARE.sub(_brace, _TEXT.sub(_unwrap, text))
    text = _SPACES.sub(" ", text).strip().rstrip(".").strip()
    choice = _CHOICE.fullmatch(text)
    return choice[1] if choice else text


def _respace(match: re.Match[str]) -> str:
    if match[0] == "\\\\":  # a new row of a matrix; what follows it is not `\\ `
        return match[0]
    return " " if match[0] in ("\\ ", "~") or "quad" in match[0] else ""


def _unwrap(match: re.Match[str]) -> str:
    return f" {match[1]} "


def _brace(match: re.Match[str]) -> str:
    top, bottom = (group.strip("{}") for group in match.groups() if group)
    return f"\\frac{{{top}}}{{{bottom}}}"


def _compact(text: str) -> str:
    return text.replace(" ", "").replace("{,}", ",")


@lru_cache(maxsize=8192)
def _number(text: str) -> _Number | None:
    """`text` as a plain number with a unit, or `None`; `x = 5` counts as 5."""
    assigned = _ASSIGNED.fullmatch(text)
    text = (assigned[1] if assigned else text).replace("{,}", ",")
    unit = ""
    match = _NUMBER.fullmatch(text)
    if match is None and (tail := _UNIT.search(text)) and tail.start():
        unit = tail[1].strip().lower()
        words = re.findall(r"[a-z]+", unit)
        if _NOT_UNITS.intersection(words):
            return None
        match = _NUMBER.fullmatch(text[: tail.start()])
    if match is None:
        return None
    try:
        value = _value(match)
    except (ZeroDivisionError, ValueError):  # 1/0; an integer beyond Python's digit limit
        return None
    written = match["decimal"] or ""
    plain = "." in written and not (match["power"] or match["power2"])
    return _Number(
        value=-value if match["sign"] == "-" else value,
        digits=len(written.partition(".")[2]) if plain else None,
        percent=bool(match["percent"]) or unit == "percent",
        unit="" if unit == "percent" else unit,
    )


def _value(match: re.Match[str]) -> Fraction:
    if match["decimal"]:
        power = int(match["power"] or match["power2"] or 0)
        return Fraction(match["decimal"].replace(",", "").rstrip(".")) * Fraction(10) ** power
    top, bottom = match["top"] or match["top2"], match["bottom"] or match["bottom2"]
    fraction = Fraction(int(top.replace(",", "")), int(bottom.replace(",", "")))
    return int(match["whole"] or match["whole2"] or 0) + fraction


def _equal_numbers(gold: _Number, answer: _Number) -> bool:
    units = {_UNIT_NAMES.get(number.unit) for number in (gold, answer)} - {None}
    if len(units) == 2:
        return False
    if gold.percent != answer.percent:
        # The one with the sign may be meant as either; the one without is what it says.
        signed, bare = (gold, answer) if gold.percent else (answer, gold)
        return bare.value in (signed.value, signed.value / 100)
    if gold.value == answer.value:
        return True
    return any(_rounds_to(exact.value, written) for exact, written in ((gold, answer), (answer, gold)))


def _rounds_to(exact: Fraction, written: _Number) -> bool:
    """Whether a decimal with at least six significant digits is `exact`, rounded to its last place."""
    if written.digits is None or abs(written.value) * 10**written.digits < 100_000:
        return False
    return bool(2 * abs(exact - written.value) * 10**written.digits <= 1)


def _is_words(text: str) -> bool:
    """Whether an answer is words (`Evelyn`, `even`, `C`) rather than an expression."""
    if len(text) == 1:
        return text.isupper() and text.isascii()
    letters = text.replace(" ", "").replace("-", "").replace("'", "")
    return len(letters) > 2 and letters.isalpha() and letters.lower() not in ("sin", "cos", "tan")
