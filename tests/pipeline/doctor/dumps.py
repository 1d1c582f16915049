"""Dumps of rollouts: sound ones, each fault of the doctor's kinds done to them, in three trainers' shapes."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

STEPS, GROUPS, SIZE = 6, 4, 6
WORDS = ["We", "add", "the", "two", "then", "take", "away", "one", "more", "so", "all", "are", "here", "sum"]
Rows = list[dict[str, Any]]


def sound(tokenizer: Any, seed: int) -> Rows:
    """Lines of the contract: rewards differ in each group, and both sides agree to fp32's rounding."""
    rng, rows = random.Random(seed), []
    for step in range(1, STEPS + 1):
        for group in range(GROUPS):
            asked = f"What is {rng.randint(10, 99)}+{rng.randint(10, 99)} for child {step}{group}?"
            prompt = f"User: {asked}\nAssistant:"
            for sample in range(SIZE):
                said = " ".join(rng.choices(WORDS, k=rng.randint(12, 24)))
                text = f" <think>{said}</think> <answer>{rng.randint(1, 99)}</answer>"
                ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
                logprobs = [-rng.expovariate(1.5) - 1e-3 for _ in ids]
                rows.append({
                    "prompt": prompt, "prompt_ids": tokenizer.encode(prompt), "completion": text,
                    "completion_ids": ids, "logprobs": logprobs,
                    "old_logprobs": [min(-1e-6, x + rng.gauss(0, 1e-5)) for x in logprobs],
                    "reward": float(sample % 2 == rng.randint(0, 1) or sample == 1),
                    "group": f"{step}-{group}",
                    "step": step, "finish_reason": "stop",
                })  # fmt: skip
            rows[-1]["reward"], rows[-2]["reward"] = 0.0, 1.0
    return rows


# ---- faults


def gap(of: Callable[[random.Random, float], float]) -> Callable[[Rows, Any], None]:
    """The trainer's log-probability as a function of the engine's."""

    def make(rows: Rows, tokenizer: Any) -> None:
        rng = random.Random(len(rows))
        for row in rows:
            row["old_logprobs"] = [min(-1e-6, of(rng, x)) for x in row["logprobs"]]

    return make


def at_another_temperature(x: float) -> float:
    """Of a token that competes with one other, at 0.7 times the temperature."""
    odds = (x - math.log(-math.expm1(x))) / 0.7
    return -math.log1p(math.exp(-odds))


def every(**values: Callable[[dict[str, Any]], Any]) -> Callable[[Rows, Any], None]:
    """Set keys of every row."""

    def make(rows: Rows, tokenizer: Any) -> None:
        for row in rows:
            row.update({key: of(row) for key, of in values.items()})

    return make


def retokenised(rows: Rows, tokenizer: Any) -> None:
    """Characters one by one: the text's own ids are others."""
    for row in rows:
        ids = [tokenizer.encode(c, add_special_tokens=False)[0] for c in row["completion"]]
        row["completion_ids"] = [*ids, tokenizer.eos_token_id]
        row["logprobs"] = row["old_logprobs"] = None


def eos(rows: Rows, tokenizer: Any) -> None:
    for row in rows:
        for key in ("completion_ids", "logprobs", "old_logprobs"):
            row[key] = row[key][:-1]


def template(rows: Rows, tokenizer: Any) -> None:
    """The turn of the assistant is not opened."""
    for row in rows:
        row["prompt"] = row["prompt"].removesuffix("\nAssistant:")
        row["prompt_ids"] = tokenizer.encode(row["prompt"])


def truncated(rows: Rows, tokenizer: Any) -> None:
    """Every completion ends at 18 tokens, in the middle of the thinking."""
    for row in rows:
        for key in ("completion_ids", "logprobs", "old_logprobs"):
            row[key] = row[key][:18]
        row["completion"], row["finish_reason"] = tokenizer.decode(row["completion_ids"]), "length"


def micro_batches(rows: Rows, tokenizer: Any) -> None:
    """Each micro-batch of five rollouts is a mean by itself; the last has fewer."""
    for step in {row["step"] for row in rows}:
        of = [row for row in rows if row["step"] == step]
        for i, row in enumerate(of):
            row["micro_batch"], row["weight"] = i // 5, 1 / len(of[i // 5 * 5 :][:5])


def duplicates(rows: Rows, tokenizer: Any) -> None:
    """Every second sample is the one before it."""
    for one, two in zip(rows[::2], rows[1::2], strict=True):
        two.update({key: one[key] for key in ("completion", "completion_ids", "logprobs", "old_logprobs")})


def entropy(rows: Rows, tokenizer: Any) -> None:
    for row in rows:
        row["logprobs"] = row["old_logprobs"] = [x * 10 ** (1 - row["step"]) for x in row["logprobs"]]


def short(rows: Rows, tokenizer: Any) -> None:
    for row in rows:
        if row["step"] > 3:
            row["completion"] = f"{row['completion'][-20:].split('>')[1].split('<')[0]}"
            row["completion_ids"] = [*tokenizer.encode(row["completion"]), tokenizer.eos_token_id]
            row["logprobs"] = row["old_logprobs"] = row["logprobs"][: len(row["completion_ids"])]


FAULTS: dict[str, Callable[[Rows, Any], None]] = {
    "stale_weights": gap(lambda rng, x: x + rng.gauss(-0.1, 0.5)),
    "precision": gap(lambda rng, x: x + rng.gauss(0, 0.02)),
    "routes": gap(lambda rng, x: x + rng.gauss(0, 0.002) + (rng.random() < 0.12) * rng.gauss(0, 1)),
    "temperature": gap(lambda rng, x: at_another_temperature(x)),
    "retokenised": retokenised,
    "eos": eos,
    "template": template,
    "silent_zero": every(reward=lambda row: 0.0),
    "flat_groups": every(reward=lambda row: float(row["group"][-1] in "02")),
    "truncation": truncated,
    "micro_batch_loss": micro_batches,
    "duplicates": duplicates,
    "entropy_collapse": entropy,
    "length_collapse": short,
}
"""By kind; contamination has a test of its own."""
BESIDE = {"silent_zero": {"flat_groups"}, "truncation": {"length_collapse"}}
"""What else a fault is, too."""


# ---- shapes


def ours(rows: Rows, folder: Path) -> Path:
    """The contract's lines."""
    path = folder / "ours.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def trl(rows: Rows, folder: Path) -> Path:
    """`log_completions` of TRL 1.16: a table a step, a column a reward; the rest in extras."""
    names = {"logprobs": "sampling_per_token_logps", "old_logprobs": "old_per_token_logps"}
    out = folder / "completions"
    out.mkdir()
    for step in sorted({row["step"] for row in rows}):
        table = []
        for row in (row for row in rows if row["step"] == step):
            part = {"accuracy_reward": row["reward"], "format_reward": row["reward"]}
            more = {k: row[k] for k in ("prompt_ids", "completion_ids", "micro_batch", "weight") if k in row}
            more |= {new: row[old] for old, new in names.items() if row.get(old)}
            asked = {"step": step, "prompt": row["prompt"], "completion": row["completion"]}
            table.append(asked | part | more | {"advantage": 0.1})
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), out / f"completions_{step:05d}.parquet")
    return out


def verl(rows: Rows, folder: Path) -> Path:
    """`rollout_data_dir` of verl: a file a step; ids and log-probabilities in the extras."""
    names = {
        "logprobs": "rollout_log_probs", "old_logprobs": "old_log_probs", "completion_ids": "response_ids",
        "prompt_ids": "prompt_token_ids", "micro_batch": "micro_batch", "weight": "weight",
    }  # fmt: skip
    out = folder / "rollouts"
    out.mkdir()
    for step in sorted({row["step"] for row in rows}):
        with (out / f"{step}.jsonl").open("w") as file:
            for row in (row for row in rows if row["step"] == step):
                line = {
                    "input": row["prompt"],
                    "output": row["completion"],
                    "gts": "7",
                    "score": row["reward"],
                }
                line |= {"step": step, "acc": bool(row["reward"])}
                line |= {new: row[old] for old, new in names.items() if row.get(old) is not None}
                file.write(json.dumps(line) + "\n")
    return out


SHAPES = {"ours": ours, "trl": trl, "verl": verl}
