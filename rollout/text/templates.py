"""Prompt templates: how a question becomes the text that a model completes. Standard library only.

Papers  R1-Zero template  arXiv:2501.12948  Table 1
        \\boxed{} prompt   arXiv:2501.12948  Sec. 3 (evaluation setup), DeepSeek-R1's README
"""

import difflib
from dataclasses import dataclass
from typing import Literal

THINK = "<think>\n"

R1_ZERO = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the user "
    "with the answer. The reasoning process and answer are enclosed within <think> </think> and "
    "<answer> </answer> tags, respectively, i.e., <think> reasoning process here </think> "
    "<answer> answer here </answer>. User: {question}. Assistant:"
)
BOXED = "{question}\nPlease reason step by step, and put your final answer within \\boxed{{}}."


@dataclass(frozen=True, slots=True)
class Template:
    """How a question becomes a prompt."""

    name: str
    text: str
    """Format string with `{question}`; the user's message when `chat`."""
    chat: bool = False
    """Wrap the text in the tokenizer's own chat template, generation prompt included."""
    think: Literal["open", "closed", "own"] = "own"
    """Chat only. The prompt always ends in `<think>\\n`, never does, or does if the chat template does."""


TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        Template("r1-zero", R1_ZERO),
        Template("r1-zero-short", "User: {question}\nAssistant:"),  # tiny models have no room for more
        Template("r1", "{question}", chat=True, think="open"),
        Template("plain", "{question}", chat=True, think="closed"),
        Template("boxed", BOXED, chat=True),
        # For reasoning models whose chat template leaves the tag to them: R1's README forces it.
        Template("boxed-think", BOXED, chat=True, think="open"),
        Template("raw", "{question}"),
        Template("qa", "Question: {question}\nAnswer:"),  # base models, with worked examples before it
    )
}


def next_question(name: str) -> str:
    """What begins the next question where worked examples stand before it in a text template; "" where
    nothing marks it, and in a chat, whose turns end by themselves."""
    template = template_named(name)
    before = "" if template.chat else template.text.partition("{question}")[0]
    return f"\n{before.split()[-1]}" if before.split() else ""


def template_named(name: str) -> Template:
    """The template of that name, or a `ValueError` with the names there are."""
    try:
        return TEMPLATES[name]
    except KeyError:
        near = difflib.get_close_matches(name, TEMPLATES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? There are" if near else "there are"
        raise ValueError(f"unknown template {name!r}; {hint}: {', '.join(TEMPLATES)}") from None
