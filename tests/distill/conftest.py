"""A toy corpus, a tokenizer for it, and a way to run the stage at micro size."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distill.student import run
from pipeline.run.directory import RunDir, open_run
from pipeline.settings.distill import DistillSettings, StudentOptimSettings
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
    """A folder with corpus.jsonl and start/, a student before it is taught anything."""
    folder = tmp_path_factory.mktemp("toy")
    rows = toy_rows(200)
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = (row["question"] + row["completion"] for row in rows)
    tokenizer = train_tokenizer(texts, 300)
    tokenizer.save_pretrained(folder / "start")
    small_llama(tokenizer, 32, 64).save_pretrained(folder / "start")
    return folder


def small_llama(tokenizer: Any, hidden: int, intermediate: int, **more: Any) -> LlamaForCausalLM:
    """Fresh weights of two layers, the same each time."""
    torch.manual_seed(0)
    shape = {"hidden_size": hidden, "intermediate_size": intermediate, "vocab_size": len(tokenizer)}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.05}
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    return LlamaForCausalLM(LlamaConfig(**shape, **heads, **ends, tie_word_embeddings=True, **more))


@pytest.fixture
def distill(toy: Path, tmp_path: Path) -> Callable[..., Path]:
    """Run the stage on the toy corpus; its directory. `hook(run_dir)` sees the run directory first."""

    def go(*, hook: Callable[[RunDir], None] | None = None, **settings: Any) -> Path:
        chosen: dict[str, Any] = {
            "runs": tmp_path,
            "corpus": (str(toy / "corpus.jsonl"),),
            "init_from": str(toy / "start"),
            "tokens_per_step": 512,
            "max_length": 128,
            "steps": 6,
            "log_every": 1,
            "threads": 1,
            "optim": StudentOptimSettings(lr=1e-2, schedule="cosine", warmup_steps=2),
        }
        config = DistillSettings(**{**chosen, **settings})
        with open_run(STAGE, config, None) as run_dir:
            if run_dir is not None:
                if hook:
                    hook(run_dir)
                run(config, run_dir)
        return config.runs / config.name / "distill"

    return go
