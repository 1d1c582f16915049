"""A run that was never run: small hand-made files as the stages leave them."""

from __future__ import annotations

import json
import math
import random

from pipeline.evaluation.intervals import interval

CHAIN = {
    # stage: models by label and where they lie, steps, accuracy, seconds
    "pretrain": ({"base": "pretrain"}, 400, 0.06, 70.5),
    "zero": ({"zero": "zero"}, 40, 0.71, 60.25),
    "sft": ({"dev1": "sft"}, 60, 0.52, 20.0),
    "grpo": ({"dev2": "grpo"}, 30, 0.78, 45.0),
    "reject": ({}, 10, None, 15.0),
    "sft2": ({"dev3": "sft2"}, 60, 0.81, 25.0),
    "grpo2": ({"r1": "grpo2"}, 30, 0.88, 45.0),
    "student": ({}, 60, None, 30.0),
    "distill": ({"student": "distill/student", "student_plain": "distill/plain"}, 60, 0.74, 40.0),
}
NASTY = "<script>alert('x')</script> & \"3 < 4\""


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")


def curve(step, steps, start, end):
    """From start to end, fast at first."""
    return start + (end - start) * (1 - math.exp(-4 * step / steps))


def stage_rows(stage, steps):
    rng = random.Random(stage)
    for step in range(1, steps + 1):
        noise = rng.gauss(0, 0.02)
        row = {"step": step, "time/elapsed_s": step * 0.5}
        if stage in ("zero", "grpo", "grpo2"):
            begin = {"zero": 0.06, "grpo": 0.5, "grpo2": 0.8}[stage]
            right = min(1.0, max(0.0, curve(step, steps, begin, CHAIN[stage][2]) + 2 * noise))
            row |= {
                "reward/accuracy": right, "reward/mean": right + 0.2,
                "reward/format": curve(step, steps, 0.3, 0.99),
                "rollout/tokens_mean": curve(step, steps, 22, 48) + 60 * noise,
                "reward/language": min(1.0, 0.98 + noise),
                "policy/entropy": curve(step, steps, 1.1, 0.2), "policy/mismatch_kl": 1e-6 * rng.random(),
            }  # fmt: skip
            if step % 10 == 0:
                row["heldout/pass@1"] = right
        elif stage == "reject":
            row |= {"data/kept": 0.6 + noise, "reward/accuracy": 0.78}
        else:
            row["loss/lm"] = curve(step, steps, 4.0 if stage == "pretrain" else 0.9, 0.35) + noise
        yield row


def answer_of(right, i):
    text = (
        f"<think>\n{i}+4={i + 4}\n{i + 4}-5={i - 1}\n</think>\n<answer>\n{i - 1 if right else i}\n</answer>"
    )
    return text if right or i % 2 else f"{i}+4-5={i}?? {NASTY}"


def make_run(folder, stages, n):
    state = {"models": {}, "not_made": {}, "not_scored": {}, "scores": {}}
    for name, (labels, steps, accuracy, seconds) in CHAIN.items():
        if name not in stages:
            state["not_made"] |= {label: f"not made yet: make {name} ARGS='--name fake'" for label in labels}
            continue
        finish(folder / name, name, seconds)
        write(folder / name / "metrics.jsonl", *stage_rows(name, steps))
        for label, value in labels.items():
            state["models"][label] = {"from": value, "path": "", "sha256": "0" * 64}
            state["scores"][label] = {"heldout": score(accuracy - 0.2 * label.endswith("plain"), n)}
            rows = [generation(i, accuracy) for i in range(12)]
            write(folder / "eval" / label / "heldout" / "generations.jsonl", *rows)
    state["not_scored"]["math500"] = "no data folder is set, and the hub cannot be read"
    if "eval" in stages:
        finish(folder / "eval", "eval", 12.0)
        (folder / "eval" / "scores.json").write_text(json.dumps(state))
    return folder


def finish(path, name, seconds):
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.toml").write_text(f'name = "fake"\nseed = 7\nstage = "{name}"\nnote = "1 < 2 & 3"\n')
    env = {"python": "3.11.7", "commit": "a" * 40, "modified": False, "packages": {"torch": "2.13.0"},
           "machine": {"cpu": "Imaginary <9000>", "cores": 2, "platform": "Linux"}, "inputs": {}}  # fmt: skip
    (path / "env.json").write_text(json.dumps(env))
    (path / "done.json").write_text(
        json.dumps({"seconds": seconds, "peak_rss_bytes": int(1e9 + seconds), "seed": 7})
    )


def score(accuracy, n):
    right = round(accuracy * n)
    bounds, method = interval([1.0] * right + [0.0] * (n - right), 1)
    return {
        "pass@1": right / n, "interval": list(bounds), "interval_method": method, "n": n, "k": 1,
        "pass@k": right / n, "cons@k": right / n, "format_rate": 0.97, "language_consistency": 0.991,
        "mean_tokens": 41.3, "truncation_rate": 0.006, "verifier_failures": 0, "prompts_too_long": 0,
    }  # fmt: skip


def generation(i, accuracy):
    right = (i * 0.37) % 1 < (accuracy or 0)
    return {
        "id": f"sum/{i}", "index": i, "sample": 0, "kind": "math", "question": f"What is {i}+4-5? {NASTY}",
        "answer": str(i - 1), "text": answer_of(right, i), "extracted": str(i - 1),
        "verdict": "correct" if right else "incorrect", "detail": "", "tokens": 24 + i,
        "finish_reason": "stop", "parts": {"accuracy": float(right)},
    }  # fmt: skip
