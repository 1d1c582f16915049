"""GRPO in one file, on one CPU thread, in about a minute.

    python examples/grpo_in_one_file.py [--seed 0]

1. A base of 0.2 million parameters, a DeepSeek-V3 in miniature, reads sums such as `47+25=`. Most of its
   texts guess the answer at once; few work it out column by column inside the think tags.
2. GRPO (DeepSeekMath, arXiv:2402.03300, Algorithm 1) trains it on such sums by rules alone: 1 for the right
   answer, 0.2 for the format. Working is right more often than guessing, so the policy learns to work.

The last line on stdout is JSON: greedy accuracy on held-out sums before RL and after it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerFast

from model import TINY, Transformer
from pipeline.settings.common import OptimSettings
from pipeline.train.learner import Learner, PolicyObjective
from pipeline.train.losses import grpo
from pipeline.train.pack import Batch, Example, mean_weights, pack, rollout_weights
from pipeline.train.place import seed_all
from pipeline.train.rollouts import example, group_advantages, mean
from rewards.reward import Scorer
from rollout.collect import sample_groups
from rollout.native.engine import NativeEngine
from rollout.text.tokenizer import completion_text, encode_example, make_prompt, train_tokenizer
from rollout.types import Graded, Problem, SamplingParams

TEMPLATE = "raw"  # the prompt is the question as it stands
MICRO_TOKENS = 4096  # of one forward and backward

PRETRAIN_STEPS, DOCUMENTS = 600, 32  # documents an update
WORKED = 0.3  # share of documents that work the sum out

STEPS = 24
PROMPTS, GROUP_SIZE = 16, 8  # the paper's batch of questions, and its G
MAX_TOKENS = 32
KL_COEF = 0.001  # the paper's beta
REF_REFRESH = 10  # steps after which the reference becomes the policy


# ---- the problems


def sums(seed: int) -> tuple[list[Problem], list[Problem]]:
    """All sums of two numbers from 10 to 49, in two parts that share none: training, and 160 held out."""
    pairs = list(itertools.product(range(10, 50), repeat=2))
    random.Random(seed).shuffle(pairs)
    problems = [Problem(f"{a}+{b}", "math", f"{a}+{b}=", str(a + b)) for a, b in pairs]
    return problems[160:], problems[:160]


def worked(problem: Problem) -> str:
    """`47+25=` column by column: units, then tens with the carry."""
    a, b = map(int, problem.id.split("+"))
    units = a % 10 + b % 10
    tens = f"{a // 10}+{b // 10}+{units // 10}={a // 10 + b // 10 + units // 10}"
    return f"<think>{a % 10}+{b % 10}={units:02} {tens}</think><answer>{a + b}</answer>"


def guessed(rng: random.Random) -> str:
    """An answer out of the blue, in the same format."""
    return f"<think>hm</think><answer>{rng.randint(20, 98)}</answer>"


# ---- the base


def documents(
    problems: Sequence[Problem], tokenizer: PreTrainedTokenizerFast, rng: random.Random
) -> Iterable[Batch]:
    """Endless batches of texts to read; the completions have weight, the questions have none."""
    while True:
        pairs = []
        for problem in rng.choices(problems, k=DOCUMENTS):
            text = worked(problem) if rng.random() < WORKED else guessed(rng)
            pairs.append(encode_example(tokenizer, problem.question, TEMPLATE, text))
        weights = mean_weights([[False] * len(prompt) + [True] * len(text) for prompt, text in pairs])
        rows = [Example([*p, *c], w) for (p, c), w in zip(pairs, weights, strict=True)]
        yield pack(rows, MICRO_TOKENS)


def pretrain(problems: Sequence[Problem], seed: int) -> tuple[Transformer, PreTrainedTokenizerFast]:
    """A base that has read both ways, and mostly guesses."""
    rng = random.Random(seed)
    texts = [p.question + worked(p) + guessed(rng) for p in problems]
    tokenizer = train_tokenizer(texts, vocab_size=270)
    shape = replace(
        TINY, vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, intermediate_size=192,
        moe_intermediate_size=64, n_routed_experts=4, num_nextn_predict_layers=0, initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    policy = Transformer(shape, seed=seed).train()
    print(f"{policy.num_parameters():,} parameters")
    optim = OptimSettings(lr=3e-3, warmup_steps=20, schedule="cosine")
    learner = Learner(policy, optim, PRETRAIN_STEPS)
    for step, batch in enumerate(itertools.islice(documents(problems, tokenizer, rng), PRETRAIN_STEPS), 1):
        metrics = learner.supervised_update(batch)
        if step % 100 == 0:
            print(f"pretrain {step}/{PRETRAIN_STEPS}  loss {metrics['loss/lm']:.3f}", flush=True)
    return policy, tokenizer


# ---- reinforcement learning


class Rollouts:
    """Completions of a policy, sampled and graded."""

    def __init__(self, policy: Transformer, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.engine = NativeEngine(policy)  # generates from the policy's own weights
        self.scorer = Scorer({"accuracy": 1.0, "format": 0.2})

    def graded(self, problems: Sequence[Problem], sampling: SamplingParams) -> list[Graded]:
        """`sampling.n` rollouts a problem, group by group, each with its rewards."""
        prompts = [make_prompt(self.tokenizer, problem, TEMPLATE) for problem in problems]
        rollouts = sample_groups(self.engine, prompts, sampling)
        texts = [completion_text(self.tokenizer, rollout, TEMPLATE) for rollout in rollouts]
        return self.scorer.grade_all(zip(rollouts, texts, strict=True))

    def accuracy(self, problems: Sequence[Problem]) -> float:
        """Share of greedy answers that are right."""
        graded = self.graded(problems, SamplingParams(MAX_TOKENS, temperature=0.0))
        return mean([g.verdict == "correct" for g in graded])


def train(policy: Transformer, rollouts: Rollouts, problems: Sequence[Problem], seed: int) -> None:
    """Algorithm 1, with one update a batch of questions: the policy that sampled is the old policy."""
    optim = OptimSettings(lr=3e-4, warmup_steps=3, schedule="linear", weight_decay=0.0, router_bias_gamma=0.0)
    learner = Learner(policy, optim, STEPS)
    objective = PolicyObjective(
        grpo, {"clip_low": 0.2, "clip_high": 0.2, "kl_coef": KL_COEF}, temperature=1.0
    )
    rng = random.Random(seed)
    for step in range(1, STEPS + 1):
        if (step - 1) % REF_REFRESH == 0:
            reference = policy.frozen()  # line 3
        questions = rng.sample(problems, PROMPTS)  # line 5
        sampling = SamplingParams(MAX_TOKENS, n=GROUP_SIZE, seed=1_000 * seed + step)
        graded = rollouts.graded(questions, sampling)  # lines 7 and 8: G outputs of each, and their rewards
        advantages = []
        for start in range(0, len(graded), GROUP_SIZE):  # line 9
            group = graded[start : start + GROUP_SIZE]
            rewards = [None if g.verdict == "error" else g.reward for g in group]  # None: no verdict, no vote
            advantages += group_advantages(rewards, "std")
        weights = rollout_weights([len(g.rollout.token_ids) for g in graded], "rollout", MAX_TOKENS)
        rows = zip(graded, advantages, weights, strict=True)
        batch = pack([example(g.rollout, a, w) for g, a, w in rows if a is not None], MICRO_TOKENS)
        metrics = learner.policy_update(batch, objective, None, reference)  # lines 10 and 11
        right = mean([g.verdict == "correct" for g in graded])
        tokens = mean([len(g.rollout.token_ids) for g in graded])
        print(
            f"grpo {step}/{STEPS}  right {right:.2f}  tokens {tokens:.1f}  "
            f"kl {metrics['loss/kl_ref']:.3f}  entropy {metrics['policy/entropy']:.2f}",
            flush=True,
        )


def main() -> None:
    """Pretrain, measure, train, measure."""
    parser = argparse.ArgumentParser(description="A base that guesses sums learns by GRPO to work them out.")
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    seed_all(seed, threads=1)
    problems, heldout = sums(seed)
    policy, tokenizer = pretrain(problems, seed)
    rollouts = Rollouts(policy, tokenizer)
    before = rollouts.accuracy(heldout)
    train(policy, rollouts, problems, seed)
    after = rollouts.accuracy(heldout)
    rollouts.scorer.close()
    print(json.dumps({"before": before, "after": after}))


if __name__ == "__main__":
    main()
