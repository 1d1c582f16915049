"""The documentation holds: generated pages are those of the code, public names have docstrings, links lead
somewhere.
"""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

from docs.build import GENERATED, PACKAGES, ROOT, markdown, pages

REGENERATE = "run `python -m docs.build` (in the environment of `make setup`) and commit what it wrote"
SOURCES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
PAGES = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")})


def name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


# ---- generated pages


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    return pages()


@pytest.mark.parametrize("page", GENERATED)
def test_generated_pages_are_those_of_the_code(made, page):
    assert (ROOT / page).is_file(), f"no {page}: {REGENERATE}"
    got = (ROOT / page).read_text(encoding="utf-8").splitlines()
    stale = [line for line in made[page].splitlines() if line not in set(got)]
    assert got == made[page].splitlines(), f"{page} is stale: {REGENERATE}; first: {stale[:1]}"


def test_no_generated_page_is_left_over():
    assert {name(file) for file in (ROOT / "docs/api").glob("*")} <= {*GENERATED}


def test_the_pages_show_what_is_public_and_no_more(made):
    page = made["docs/api/pipeline.md"]
    for shown in (
        "\n## pipeline.train.losses\n",
        "\n### grpo\n",
        "tokens: Tokens, *, clip_low: float, clip_high: float, kl_coef: float",
        "Units   log-",
    ):
        assert shown in page
    assert not re.search(r"^### _|^(?:async )?def _(?!_)", page, re.MULTILINE)
    settings = made["docs/settings.md"]
    row = r"^\| `--optim\.beta2` \| number in \[0, 1\) \| `0\.95` \| AdamW's second-moment decay\. \|$"
    assert re.search(row, settings, re.MULTILINE)


@pytest.mark.parametrize("config", sorted(ROOT.glob("configs/*/*.toml")), ids=name)
def test_the_settings_page_has_every_setting_of_a_preset(made, config):
    def flags(table, prefix="--"):
        for key, value in table.items():
            flag = prefix + key.replace("_", "-")
            yield from flags(value, f"{flag}.") if isinstance(value, dict) else [flag]

    sections = re.split(r"^## ", made["docs/settings.md"], flags=re.MULTILINE)
    section = next(s for s in sections if config.stem in s.partition("\n")[0].split(", "))
    used = list(flags(tomllib.loads(config.read_text(encoding="utf-8"))))
    tables = tuple(f"{flag}." for flag in re.findall(r"^\| `(--\S+)` \| table", section, re.MULTILINE))
    assert used and not [f for f in used if f"| `{f}` |" not in section and not f.startswith(tables)]


def test_docstrings_become_markdown():
    text = "A `a*b`, 2 * c.\n\n    y = 2 * x  (Eq. 1)\n\nArgs:\n    x: `n`,\n        input.\n    y: output."
    want = (
        "A `a*b`, 2 \\* c.\n\n```text\ny = 2 * x  (Eq. 1)\n```\n\nArgs:\n\n- `x`: `n`, input.\n- `y`: output."
    )
    assert markdown(text).strip() == want


# ---- docstrings


@pytest.mark.parametrize("file", SOURCES, ids=name)
def test_modules_and_public_names_have_docstrings(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert not tree.body or ast.get_docstring(tree), f"{name(file)} has no docstring"
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    bare = [node.name for node in public if not ast.get_docstring(node)]
    assert not bare, f"{name(file)}: no docstring: {', '.join(bare)}"


# ---- links


def prose(text: str) -> str:
    """Markdown without its code, where brackets and number signs are something else."""
    return re.sub(r"`[^`\n]*`", "code", re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(text: str) -> set[str]:
    """What `#anchor` can name in a page: GitHub's spelling of its headings, -1 and so on at repeated ones."""
    seen: dict[str, int] = {}
    found = set()
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if slug in seen else slug)
        seen[slug] = seen.get(slug, 0) + 1
    return found


def broken(page: Path) -> list[str]:
    """Relative links of a page that lead to no file, or to no heading of it."""
    bad = []
    links = re.findall(r"\]\(<?([^)>\s]+)>?(?: \"[^\"]*\")?\)", prose(page.read_text(encoding="utf-8")))
    for link in links:
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z][a-z+.-]*:", link):
            continue
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            bad.append(link)
    return bad


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_a_file_and_a_heading(page):
    assert not broken(page), f"{name(page)} has broken links"


def test_broken_links_are_found(tmp_path):
    page = tmp_path / "a.md"
    page.write_text(
        "# One `f(x)`, two\n## Same\n## Same\n"
        "[a](#one-fx-two) [b](#same-1) [c](a.md#same) [d](https://x.org/y)\n"
        "[e](b.md) [f](#other) [g](a.md#same-2) [`h`](i.md)\n"
        "`[j](code.md)`\n```\n[k](code.md)\n# No heading\n```\n[l](#no-heading)\n"
    )
    assert broken(page) == ["b.md", "#other", "a.md#same-2", "i.md", "#no-heading"]
