"""The R1 format: one think block, then one answer block, and nothing else (arXiv:2501.12948, Sec. 2.2.2).

A completion is graded together with the template's prefill, so whether `<think>` was written by the
template or by the model, one rule serves.
"""

from __future__ import annotations

import re

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_SHAPE = re.compile(r"\s*<think>(?P<think>.*)</think>\s*<answer>(?P<answer>.*)</answer>\s*", re.DOTALL)


def in_format(completion: str) -> bool:
    """Whether `completion` (prefill included) is `<think>…</think> <answer>…</answer>`, both non-empty."""
    if any(completion.count(tag) != 1 for tag in _TAGS):
        return False  # with each tag there exactly once, the greedy pattern below cannot backtrack far
    shape = _SHAPE.fullmatch(completion)
    return shape is not None and bool(shape["think"].strip()) and bool(shape["answer"].strip())
