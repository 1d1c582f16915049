"""Evaluations' folders that are damaged, by what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.pipeline.wrong import DEEP, Maker, a_folder, cut, edited, removed, replaced


def recorded(**changes: Any) -> Maker:
    """Other inputs in an evaluation's scores.json; `...` removes one."""

    def edit(folder: Path) -> None:
        inputs = json.loads((folder / "scores.json").read_text())["inputs"] | changes
        edited("scores.json", inputs={k: v for k, v in inputs.items() if v is not ...})(folder)

    return edit


EVALUATIONS: dict[str, Maker] = {
    "no scores": removed("scores.json"),
    "no generations": removed("generations.jsonl"),
    "scores are empty": replaced("scores.json", ""),
    "scores are garbage": replaced("scores.json", b"\xff\xfe{"),
    "scores are cut": cut("scores.json", 0.5),
    "scores are a list": replaced("scores.json", "[]"),
    "scores are nested too deep": replaced("scores.json", DEEP),
    "scores are a folder": a_folder("scores.json"),
    "score is NaN": edited("scores.json", **{"pass@1": float("nan")}),
    "score is above 1": edited("scores.json", **{"pass@1": 1.5}),
    "score is text": edited("scores.json", **{"pass@1": "0.5"}),
    "score is another": edited("scores.json", **{"pass@1": 0.25}),
    "interval of one": edited("scores.json", interval=[0.5]),
    "no k": edited("scores.json", k=...),
    "k is 0": edited("scores.json", k=0),
    "k is another": edited("scores.json", k=3),
    "n is true": edited("scores.json", n=True),
    "no inputs": edited("scores.json", inputs=None),
    "benchmark is a number": recorded(benchmark=5),
    "no hash of the problems": recorded(problems_sha256=...),
    "other problems": recorded(problems_sha256="00"),
    "generations are empty": replaced("generations.jsonl", b""),
    "generations are garbage": replaced("generations.jsonl", b"\x80\x81\xfe\xff" * 20),
    "generations are torn": cut("generations.jsonl", 0.9),
    "generations are a folder": a_folder("generations.jsonl"),
    "generations lack keys": replaced("generations.jsonl", '{"index": 0, "sample": 0}\n' * 6),
    "a row twice": lambda d: replaced("generations.jsonl", (d / "generations.jsonl").read_bytes() * 2)(d),
}
"""Evaluations that cannot be compared."""
