"""Pages for people: one HTML file each, in one style. No network, no script, all text escaped."""

import re
from pathlib import Path
from typing import Any

import tomli_w
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.evaluation.scores import percent
from pipeline.run.metrics import duration

LIGHT = {
    "paper": "#fbfaf7", "card": "#ffffff", "ink": "#1d1c1a", "soft": "#5f5d57", "faint": "#e6e3dc",
    "accent": "#1f5fae", "s0": "#6b7280", "s1": "#c2570c", "s2": "#7c4fc4", "s3": "#2563b0", "s4": "#8a8478",
    "s5": "#b83280", "s6": "#157f5b", "s7": "#0e7490", "s8": "#8a6d1a",
}  # fmt: skip
"""The pages' colours by the name of their CSS variable; each has a value of its own."""


def render(template: str, **given: Any) -> str:
    """The page of a template of this folder, from all that it names."""
    files = FileSystemLoader(Path(__file__).parent)
    env = Environment(loader=files, autoescape=True, undefined=StrictUndefined)
    env.filters |= {"percent": percent, "duration": duration, "toml": tomli_w.dumps}
    return env.get_template(template).render(light=LIGHT, **given)


_THINK = re.compile(r"\A(\s*(?:<think>)?.*?</think>)(.*)\Z", re.DOTALL)


def split_thought(text: str) -> dict[str, str]:
    """`think` and `rest` of a completion."""
    split = _THINK.match(text)
    return dict(zip(("think", "rest"), split.groups() if split else ("", text), strict=True))
