"""No file uses a word that the project's word list forbids. The rest of the list is judged by reading."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs.build import GENERATED

ROOT = Path(__file__).parent.parent
SUFFIXES = {".py", ".md", ".toml", ".j2"}
MADE = {"runs", "build", "dist"}

WORDS = {  # what is forbidden: what to say
    r"(?:re)?(?:draw(?:s|n|er|ers|ing|ings|able)?|drew)": "sample, generate; plot a picture",
    r"anew": "again",
    r"(?:giv(?:e|es|en|ing)|gave) way": "preempt, prefill again",
    r"nobody['’]s": "padding, unused",
    r"so many": "N, at most N",
    r"to be had": "available",
    r"in force": "active",
    r"(?:tak(?:e|es|en|ing)|took) turns": "one at a time",
    r"had had": "had",
}


def pattern(words: str) -> re.Pattern[str]:
    """A matcher of `words`. Underscores and digits end a word; a phrase may span two lines of a comment."""
    spaced = words.replace(" ", r"[\s_#-]+")
    return re.compile(rf"(?<![a-z]){spaced}(?![a-z])", re.IGNORECASE)


PATTERNS = {pattern(words): say for words, say in WORDS.items()}
ALLOWED = [  # (file, what the line matches, why)
    ("tests/test_words.py", r"", "the list itself"),
    ("CONTRIBUTING.md", r"^\|", "a row of the word list"),
]


def found(text: str) -> list[tuple[int, str, str]]:
    """Line number, the line or lines, and what to say instead, of each forbidden word in `text`."""
    hits = []
    for words, say in PATTERNS.items():
        for match in words.finditer(text):
            start = text.rfind("\n", 0, match.start()) + 1
            lines = text[start : match.end()] + text[match.end() :].partition("\n")[0]
            hits.append((text.count("\n", 0, match.start()) + 1, lines.strip(), say))
    return sorted(hits)


def files() -> list[Path]:
    tops = [top for top in ROOT.iterdir() if top.name not in MADE and not top.name.startswith(".")]
    every = [file for top in tops for file in [top, *top.rglob("*")]]
    ours = {file for file in every if file.suffix in SUFFIXES or file.name == "Makefile"}
    return sorted(ours - {ROOT / page for page in GENERATED})  # those say what the docstrings say


@pytest.mark.parametrize("file", files(), ids=lambda file: file.relative_to(ROOT).as_posix())
def test_no_forbidden_word(file):
    name = file.relative_to(ROOT).as_posix()
    allowed = [re.compile(line) for path, line, _ in ALLOWED if path == name]
    hits = [hit for hit in found(file.read_text("utf-8")) if not any(a.search(hit[1]) for a in allowed)]
    assert not hits, "".join(f"\n{name}:{number}: {line!r}: say {say}" for number, line, say in hits)


def test_every_exception_is_still_needed():
    for name, line, reason in ALLOWED:
        hits = found((ROOT / name).read_text(encoding="utf-8"))
        assert reason and any(re.search(line, hit[1]) for hit in hits), f"{name}: nothing matches {line!r}"


@pytest.mark.parametrize(
    "text",
    [
        "most_draws: int",
        "def redraw():",
        "Drawn once",
        "it drew 3",
        "routed anew",
        "rows that gave way",
        "rows for nobody's use",
        "# at most so\n    # many rows",
        "sandbox_in_force(pool)",
        "where none is to be had",
        "experts take\nturns",
        "that it had had",
    ],
)
def test_forbidden_words_are_found(text):
    assert [hit[:2] for hit in found(f"a\n{text}\nb")] == [(2, text)]


@pytest.mark.parametrize("text", ["a drawback", "withdraw", "enforce", "renew", "in forceps", "drawl"])
def test_other_words_are_not(text):
    assert not found(text)
