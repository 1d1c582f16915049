"""A toy corpus, a tokenizer for it, and a way to run the stage at micro size."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.student import run
from pipeline.run.directory import RunDir, open_run
from pipeline.settings.common import AdamWSettings
from pipeline.settings.distill import DistillSettings, ShapeSettings
from pipeline.table import STAGES
from rollout.text.tokenizer import train_tokenizer

STAGE = next(stage for stage in STAGES if stage.name == "distill")


def toy_rows(count: int) -> list[dict[str, str]]:
    """Sums worked line by line in R1's format."""
    rng = random.Random(0)
    rows = []
    for i in range(count):
        terms = [rng.randint(1, 4) for _ in range(rng.randint(3, 5))]
        value, lines = terms[0], []
        for term in terms[1:]:
            lines.append(f"{value}+{term}={value + term}")
            value += term
        steps = "\n".join(lines)
        rows.append(
            {
                "id": f"toy/{i}",
                "question": "+".join(map(str, terms)),
                "completion": f"<think>\n{steps}\n</think>\n<answer>{value}</answer>",
                "answer": str(value),
                "language": "en",
                "kind": "math",
                "source": "toy",
            }
        )
    return rows


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with corpus.jsonl and tokenizer/, which passes for a model directory."""
    folder = tmp_path_factory.mktemp("toy")
    rows = toy_rows(200)
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = (row["question"] + row["completion"] for row in rows)
    train_tokenizer(texts, 300).save_pretrained(folder / "tokenizer")
    (folder / "tokenizer" / "config.json").write_text("{}")
    return folder


@pytest.fixture
def distill(toy: Path, tmp_path: Path) -> Callable[..., Path]:
    """Run the stage on the toy corpus; its directory. `hook(run_dir)` sees the run directory first."""

    def go(*, hook: Callable[[RunDir], None] | None = None, **settings: Any) -> Path:
        chosen: dict[str, Any] = {
            "runs": tmp_path,
            "corpus": (str(toy / "corpus.jsonl"),),
            "tokenizer_from": str(toy / "tokenizer"),
            "shape": ShapeSettings(hidden=32, layers=2, heads=2, intermediate=64),
            "tokens_per_step": 512,
            "max_length": 128,
            "steps": 6,
            "log_every": 1,
            "threads": 1,
            "optim": AdamWSettings(lr=1e-2, schedule="cosine", warmup_steps=2),
        }
        config = DistillSettings(**{**chosen, **settings})
        with open_run(STAGE, config, None) as run_dir:
            if run_dir is not None:
                if hook:
                    hook(run_dir)
                run(config, run_dir)
        return config.runs / config.name / "distill"

    return go
