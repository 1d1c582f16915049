"""Evaluation folders with the verdicts that a test wants."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.evaluation.scores import scores


def row(index: int, sample: int, right: bool, **changes: Any) -> dict[str, Any]:
    """A row of generations.jsonl."""
    answer = str(index) if right else "no"
    return {
        **{"id": f"q-{index}", "kind": "math", "question": f"What is {index}?", "answer": str(index)},
        **{"index": index, "sample": sample, "text": f"<think>\nI think <b>{index}</b>\n</think>\n{answer}"},
        **{"extracted": answer, "verdict": "correct" if right else "incorrect", "detail": "", "parts": {}},
        **{"tokens": 7 + index, "finish_reason": "stop"},
        **changes,
    }


def evaluation(
    folder: Path, right: Sequence[Sequence[bool]], families: Sequence[str] = (), **inputs: Any
) -> Path:
    """A finished evaluation: whether each sample of each question is right; the family of each question."""
    of = [{"labels": {"family": name}} for name in families] or [{}] * len(right)
    rows = [row(i, j, mark, **of[i]) for i, marks in enumerate(right) for j, mark in enumerate(marks)]
    folder.mkdir(parents=True)
    (folder / "generations.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    given = {
        "benchmark": "sums",
        "problems_sha256": "ab" * 32,
        "model": f"models/{folder.name}",
        "engine": "native",
    }
    made = {"template": "r1", "template_hash": "cd" * 32}
    sampling = {"temperature": 0.6, "top_p": 0.95, "max_tokens": 256, "seed": 0}
    made |= {"sampling": {key: inputs.pop(key, value) for key, value in sampling.items()}}
    made |= {key: inputs.pop(key) for key in ("template_hash", "graded_again") if key in inputs}
    (folder / "scores.json").write_text(json.dumps({**scores(rows), **made, "inputs": given | inputs}))
    return folder
