"""Steps of GRPO on random weights, in a process of its own: ours, or those of TRL's GRPOTrainer.

    python -m tests.bench._grpo WHO POLICY PRECISION FLAT FOLDER STEPS

prints one JSON: seconds of every step after the first two, seconds of each part a step, tokens, peak memory.
Both have the prompts, the reward (a hash of the completion), one update a step, and no KL penalty.
"""

from __future__ import annotations

import json
import random
import sys
import time
import zlib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rollout.types import Problem
from tests.bench._peer import ours
from tests.bench.measure import peak_bytes

PROMPTS, GROUP, NEW, WARM = 4, 8, 128, 2
FLAT = "flat"
"""Word of the questions whose completions all have one reward."""
LLAMA = {
    "vocab_size": 4096, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6,
    "num_attention_heads": 6, "max_position_embeddings": 1024, "tie_word_embeddings": False,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


def spread(problem: Problem, completion: str) -> float:
    """A reward that differs from completion to completion, or does not."""
    return 1.0 if FLAT in problem.question else zlib.crc32(completion.encode()) % 1000 / 1000


def questions(flat: bool) -> list[str]:
    """A step's prompts, 36 to 64 bytes, a token each; with `flat` every second one is flat."""
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz "
    texts = ("".join(rng.choices(letters, k=rng.randint(32, 60))) for _ in range(PROMPTS))
    return [f"{FLAT if flat and i % 2 else 'deep'}{text}"[:64] for i, text in enumerate(texts)]


def checkpoint(folder: Path, policy: str) -> Path:
    """A model directory that both load: `moe`, 12.3M of DeepSeek-V3, or `dense`, a 13.8M Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import model
    from rollout.text.tokenizer import train_tokenizer

    path = folder / policy
    if not path.exists():
        torch.manual_seed(0)
        if policy == "moe":
            model.save(ours(), path)
        else:
            LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(path)
        tokenizer = train_tokenizer(["<think>a</think>"], 265)
        tokenizer.save_pretrained(path)
        config = json.loads((path / "config.json").read_text())  # completions of both end at the same token
        config["eos_token_id"] = tokenizer.eos_token_id
        (path / "config.json").write_text(json.dumps(config))
    return path


def our_steps(path: Path, precision: str, flat: bool, steps: int) -> dict[str, Any]:
    """Steps of the stage `zero`, as `make zero` takes them."""
    from pipeline.run.directory import open_run
    from pipeline.settings.common import OptimSettings
    from pipeline.settings.rollouts import GrpoSettings
    from pipeline.stages.grpo import Trainer
    from pipeline.table import STAGES

    rows = path.parent / f"questions-{flat}.jsonl"
    rows.write_text("".join(json.dumps({"question": q, "answer": "1"}) + "\n" for q in questions(flat)))
    config = GrpoSettings(
        name=f"bench-{time.time_ns()}", runs=path.parent, init_from=str(path), problems=(str(rows),),
        template="raw", prompts_per_step=PROMPTS, group_size=GROUP, max_tokens=NEW, kl_coef=0.0, eval_every=0,
        threads=1, log_samples=0, rewards={f"{__name__}:spread": 1.0}, heldout=(), steps=steps + WARM,
        share_prompts=True,
        optim=OptimSettings(lr=1e-6, precision=precision),
    )  # fmt: skip
    seconds, parts = list[float](), defaultdict[str, float](float)
    tokens = 0.0
    with open_run(next(s for s in STAGES if s.name == "zero"), config, "bench") as run_dir:
        assert run_dir is not None
        trainer = Trainer(config, run_dir)
        run_dir.metrics.begin()
        for step in range(1, steps + WARM + 1):
            began = time.perf_counter()
            metrics, _ = trainer.step(step)
            if step > WARM:
                seconds.append(time.perf_counter() - began)
                for part, key in (("generate", "rollout_s"), ("score", "reward_s"), ("train", "train_s")):
                    parts[part] += metrics[f"time/{key}"]
                parts["sync"] += metrics.get("time/sync_s", 0.0)
                tokens += metrics["rollout/tokens_mean"] * PROMPTS * GROUP
        trainer.close()
    return {"seconds": seconds, "parts": {k: v / steps for k, v in parts.items()}, "tokens": tokens / steps}


def timed(owner: Any, name: str, part: str, parts: dict[str, float]) -> None:
    """Have method `name` of `owner` add its seconds to `parts[part]`."""
    method: Callable[..., Any] = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            parts[part] += time.perf_counter() - began

    setattr(owner, name, call)


def their_steps(path: Path, precision: str, flat: bool, steps: int) -> dict[str, Any]:
    """Steps of GRPOTrainer, generating in process with transformers, at its fastest settings here."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    how = {"attn_implementation": "eager", "experts_implementation": "grouped_mm"}
    how = how if path.name == "moe" else {"attn_implementation": "sdpa"}
    net = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **how)
    tokenizer = AutoTokenizer.from_pretrained(path)
    seconds, parts, begun = list[float](), defaultdict[str, float](float), [0.0]
    tokens = [0.0]

    def reward(prompts: list[str], completions: list[str], completion_ids: Any, **_: Any) -> list[float]:
        tokens[0] += sum(map(len, completion_ids))
        asked = (Problem(id="", kind="general", question=prompt) for prompt in prompts)
        return [spread(problem, text) for problem, text in zip(asked, completions, strict=True)]

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            now = time.perf_counter()
            if state.global_step > WARM:
                seconds.append(now - begun[0])
            else:
                parts.clear()
                tokens[0] = 0.0
            begun[0] = time.perf_counter()

    args = GRPOConfig(
        output_dir=str(path.parent / "trl"), per_device_train_batch_size=PROMPTS * GROUP,
        num_generations=GROUP, max_completion_length=NEW, temperature=1.0, beta=0.0, learning_rate=1e-6,
        max_steps=steps + WARM, bf16=precision == "bfloat16", loss_type="grpo", report_to="none",
        save_strategy="no", use_cpu=True, logging_strategy="no", gradient_checkpointing=False,
        disable_tqdm=True, shuffle_dataset=False,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=net, reward_funcs=reward, args=args, processing_class=tokenizer, callbacks=[Clock()],
        train_dataset=Dataset.from_list([{"prompt": text} for text in questions(flat)]),
    )  # fmt: skip
    timed(trainer, "_generate", "generate", parts)
    timed(trainer, "_calculate_rewards", "score", parts)
    timed(trainer, "_get_per_token_logps_and_entropies", "forwards", parts)
    trainer.train()
    shares = {part: value / steps for part, value in parts.items()}
    return {"seconds": seconds, "parts": shares, "tokens": tokens[0] / steps}


def main(who: str, policy: str, precision: str, flat: str, folder: str, steps: str) -> None:
    """See the module's docstring."""
    torch.set_num_threads(1)
    path = checkpoint(Path(folder), policy)
    run = our_steps if who == "ours" else their_steps
    found = run(path, precision, flat == "flat", int(steps))
    print(json.dumps(found | {"peak_bytes": peak_bytes()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
