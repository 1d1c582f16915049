"""Metrics: every key explained once, one JSON line a step, one console line a step with the time left."""

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

from pipeline.data.jsonl import read_log, write_jsonl
from pipeline.run.files import write_atomic
from rewards.reward import REWARDS

GLOSSARY: dict[str, str] = {
    "loss/total": "what the optimizer minimizes, summed over the update's token weights (SFT: nats a token)",
    "loss/lm": "next-token cross-entropy, nats a token",
    "loss/mtp": "cross-entropy of the multi-token-prediction module, nats a token, before its weight",
    "loss/balance": "sequence-wise expert balance loss (arXiv:2412.19437, Eq. 17), before its weight",
    "loss/divergence": "divergence of the student from its teacher, a mean over completion tokens, nats",
    "loss/policy": "the policy loss: surrogate less KL penalty, negated, without the entropy bonus",
    "loss/clip_frac": "share of token weight whose ratio was clipped",
    "loss/kl_ref": "KL(policy || reference) as kl_estimator has it, in the loss's token weights, nats",
    "policy/entropy": "mean entropy of the policy at the completion tokens, nats",
    "policy/mismatch_kl": "k3 estimate of KL between the engine's and the trainer's policy, nats a token",
    "policy/experts_differ": "share of experts that the trainer's own gate chooses and the engine did not",
    "policy/mismatch_max": "largest |log-probability of engine - of trainer| of a completion token, nats",
    "policy/corrected": "share of completion tokens whose correction ratio was truncated or masked",
    "gap/kl": "policy/mismatch_kl, where it exceeds rounding in fp32 (1e-6); its cause shows in the others",
    "gap/median": "median difference of a logit between engine and trainer, over uncertain tokens",
    "gap/tail": "share of those tokens whose difference exceeds 8 medians (much: other experts)",
    "gap/extreme": "99th percentile of the difference over its median",
    "gap/bias": "mean difference over deviation and mean, trainer less engine (rounding: near 0)",
    "gap/slope": "slope of the difference over the engine's logit or log-probability",
    "gap/fit": "R^2 of that line (near 1: another temperature)",
    "gap/first": "median difference at a completion's first token over that of later ones (much: the prompt)",
    "gap/aligned": "rank correlation of a rollout's difference with its advantage (much: weights of before)",
    "optim/lr": "learning rate of the update",
    "optim/grad_norm": "global gradient norm before clipping",
    "optim/skipped": "updates skipped so far: loss or gradient not finite, or the gradient norm a spike",
    "reward/mean": "mean weighted reward of the step's rollouts",
    **{f"reward/{entry.name}": entry.summary for entry in REWARDS.values()},
    "reward/errors": "rollouts whose verifier failed; they are dropped from the loss",
    "reward/groups_with_spread": "share of prompt groups whose rewards differ, the ones that teach",
    "rollout/tokens_mean": "mean completion length, tokens",
    "rollout/truncated": "share of completions cut at max_tokens",
    "time/tokens_per_s": "completion tokens sampled a second",
    "rollout/mtp_acceptance": "share of tokens guessed by the MTP module that were right (speculation)",
    "rollout/preemptions": "completions preempted because the cache was full, and prefilled again later",
    "rollout/unended": "share of the completions that stopped whose end token is missing",
    "rollout/observations": "mean observations in a completion, of an environment",
    "rollout/observed": "mean tokens of them in a completion; they are out of the loss",
    "rollout/groups_sampled": "groups sampled for the step, those left out for want of spread included",
    "rollout/staleness": "updates between the policy that began a rollout and the one it trains; the mean",
    "rollout/staleness_max": "the same of the oldest rollout",
    "rollout/renewed": "share of rollouts during which their engine got newer weights",
    "rollout/version": "number of optimizer updates in the weights that the engine sampled with",
    "router/max_violation": "largest expert load over the mean, less 1, worst layer (0 = even); /N: layer N",
    "router/idle": "share of experts, over all layers, that got no token in the update",
    "heldout/loss": "cross-entropy of the completions of a held-out set, nats a token",
    "heldout/pass@1": "greedy accuracy on a slice of the held-out problems",
    "heldout/tokens_mean": "mean length of those greedy completions, tokens",
    "heldout/format": "share of those greedy completions in format",
    "data/epoch": "passes over the training set so far",
    "data/tokens": "tokens trained on so far",
    "data/sampled": "completion tokens sampled so far",
    "data/kept": "share of sampled completions that the filters kept",
    "time/step_s": "seconds of this step",
    "time/rollout_s": "seconds of this step spent sampling completions",
    "time/reward_s": "seconds of this step spent grading",
    "time/train_s": "seconds of this step spent on forward, backward and update",
    "time/sync_s": "seconds of this step spent handing weights to the engine",
    "time/wait_s": "seconds of this step spent waiting for rollouts that are sampled beside training",
    "time/trained_tokens_per_s": "prompt and completion tokens trained on a second, on this GPU (or CPU)",
    "time/mfu": "model FLOPs of training and scoring, share of the GPU's peak (arXiv:2204.02311, App. B)",
    "memory/peak_gib": "most memory that torch's tensors took on the GPU since the step before, GiB",
    "time/elapsed_s": "seconds since the stage began, earlier sessions included",
}

SHORT = {
    "loss/lm": "loss", "loss/divergence": "divergence",
    "reward/mean": "reward", "reward/accuracy": "acc", "reward/format": "format",
    "reward/language": "lang", "rollout/tokens_mean": "len", "rollout/truncated": "cut",
    "policy/mismatch_kl": "mismatch", "loss/kl_ref": "kl", "router/max_violation": "maxvio",
    "heldout/pass@1": "heldout", "heldout/loss": "heldout loss", "data/kept": "kept",
}  # fmt: skip
"""The metrics of the console line and their short names."""
GLOSSARY_FILE = "glossary.json"
"""In a stage's directory: what the metrics of a user's own rewards mean."""


def explained(key: str) -> str:
    """The key's entry in `GLOSSARY`: `router/max_violation/3`, of one layer, is explained under its stem."""
    stem, _, last = key.rpartition("/")
    return stem if last.isdigit() else key


def duration(seconds: float) -> str:
    """`75` -> `1m15s`."""
    s = max(0, round(seconds))
    if s < 60:
        return f"{s}s"
    return f"{s // 60}m{s % 60:02d}s" if s < 3600 else f"{s // 3600}h{s % 3600 // 60:02d}m"


class MetricsLog:
    """`metrics.jsonl`, line-buffered: each line survives a kill at any moment."""

    def __init__(self, path: Path, stage: str, keep_to: int | None = None) -> None:
        """Append to `path`; on a resume, drop what came after step `keep_to`, which will be made again."""
        self.stage, self.first, self.elapsed_before = stage, keep_to or 0, 0.0
        self.started = self.loop_began = time.monotonic()
        self.own, self.explained = dict[str, str](), 0
        self.glossary_file = path.with_name(GLOSSARY_FILE)
        if keep_to is not None:
            truncate_after(path, keep_to)
            rows = read_log(path)
            self.elapsed_before = rows[-1].get("time/elapsed_s", 0.0) if rows else 0.0
        self.file: IO[str] = path.open("a", encoding="utf-8", buffering=1)
        self.track: Callable[[int, Mapping[str, float]], None] | None = None  # gets each step, too

    def explain(self, glossary: Mapping[str, str]) -> None:
        """Accept the metrics of `glossary`, name: one line, too. Its new lines go to `GLOSSARY_FILE`."""
        self.own |= {key: line for key, line in glossary.items() if explained(key) not in GLOSSARY}

    def begin(self, done: int | None = None) -> None:
        """The step after `done` starts now; time before it, such as loading, is not counted in it."""
        self.loop_began, self.first = time.monotonic(), self.first if done is None else done

    @property
    def elapsed_s(self) -> float:
        """Seconds of work on the stage, earlier sessions included."""
        return self.elapsed_before + time.monotonic() - self.started

    def log(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """Write step `step` of `total` and print its line. A key that is not explained is a `KeyError`."""
        if unknown := set(map(explained, metrics)) - set(GLOSSARY) - set(self.own):
            raise KeyError(f"metrics without an entry in pipeline.run.metrics.GLOSSARY: {sorted(unknown)}")
        row = {"step": step, **{k: float(f"{float(v):.8g}") for k, v in metrics.items()}}
        row["time/elapsed_s"] = round(self.elapsed_s, 3)
        if len(self.own) > self.explained:
            self.explained = len(self.own)
            write_atomic(self.glossary_file, json.dumps(self.own, indent=2) + "\n")
        self.file.write(json.dumps(row) + "\n")
        if self.track:
            self.track(step, {k: v for k, v in row.items() if k != "step"})
        short = SHORT | {key: key.removeprefix("reward/") for key in self.own}
        shown = [f"{short[k]} {v:.3g}" for k, v in metrics.items() if k in short]
        a_step = (time.monotonic() - self.loop_began) / max(1, step - self.first)
        left = duration(a_step * (total - step))
        say(f"{self.stage:8} {step:>4}/{total}  {'  '.join(shown)}  {a_step:.2f} s/step  left {left}")


def truncate_after(path: Path, step: int) -> None:
    """Keep the rows of `path` up to and including `step`, atomically; one without a step is damaged."""
    rows = read_log(path)
    write_jsonl(path, [row for row in rows if isinstance(at := row.get("step"), int) and at <= step])


def say(text: str) -> None:
    """Print one line on the console at once, on rank 0 alone."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)
