"""The data of a rollout, one frozen type per state: Problem -> Prompt -> Rollout -> Graded.

Standard library only, so that engines, rewards and trainers in any process can share it.
Units: log-probabilities in nats under the distribution that was sampled from.
"""

import itertools
import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["math", "code", "general"]
Language = Literal["en", "zh"]
FinishReason = Literal["stop", "length"]
Verdict = Literal["correct", "incorrect", "error"]
Eos = int | Sequence[int] | None
"""Ids that end a completion, where a model or a caller has any."""


@dataclass(frozen=True, slots=True)
class StdioTest:
    """One stdin/stdout case: `output` is compared token by token, line by line."""

    input: str
    output: str


@dataclass(frozen=True, slots=True)
class Problem:
    """A question whose answer a rule can check."""

    id: str
    kind: Kind
    question: str
    answer: str = ""
    """Gold answer of a math problem, as text or LaTeX; empty for code."""
    tests: tuple[str | StdioTest, ...] = ()
    """Code only: Python statements that raise on failure (`assert f(1) == 2`), or stdin/stdout cases."""
    source: str = ""
    """Where the problem comes from: a generator's, file's or data set's name."""
    language: Language = "en"
    """The language that the question is asked in and the answer should be reasoned in."""
    shown: int = 0
    """Code only: how many of `tests`, from the first on, the question shows."""
    labels: Mapping[str, str] = field(default_factory=dict, hash=False, repr=False)
    """What evaluations report by: `subject`, `level`, and `family`, of questions that are variants of one."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A problem as the model sees it."""

    problem: Problem
    template: str
    """Name of its template; it also tells which text was prefilled into the completion."""
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How completions are sampled. Temperature 0 is greedy; top_p 1 and top_k 0 switch those filters off."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    n: int = 1
    """Rollouts per prompt; they share one prefill."""
    seed: int = 0
    """With the indices of prompt and sample this fixes a rollout, whatever it is batched with."""
    stop_token_ids: tuple[int, ...] = ()
    """Sampling ends with, and includes, any of these."""
    stop: tuple[str, ...] = ()
    """Sampling ends with the token that completes any of these in the text, which is kept in full."""
    min_tokens: int = 0
    """Nothing ends a completion before this number of tokens; until then stop tokens have probability 0."""
    ignore_eos: bool = False
    """Never stop before `max_tokens` (for benchmarks)."""
    first_index: int = 0
    """Index of the first prompt in the larger request that this one is a part of; with it, a part samples the
    rollouts of the larger one. `Rollout.index` still counts within this request."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.n < 1:
            raise ValueError(f"max_tokens={self.max_tokens} and n={self.n} must be at least 1.")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} must be in 0 .. max_tokens={self.max_tokens}.")
        if isinstance(self.stop, str) or not all(self.stop):
            raise ValueError(f"stop={self.stop!r} must be a sequence of strings, none of them empty.")
        warm = 1e-6 <= self.temperature < math.inf  # below, logits divided by it would leave fp32's range
        if not (warm or self.temperature == 0) or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(
                f"temperature={self.temperature} must be 0 or at least 1e-6, top_p={self.top_p} in (0, 1], "
                f"top_k={self.top_k} >= 0."
            )


@dataclass(frozen=True, slots=True)
class Rollout:
    """One completion with the record of its sampling: 8 bytes a token, whatever sequences it is made of."""

    prompt: Prompt
    index: int
    """Of the prompt in the request."""
    sample: int
    """0 .. n - 1 within the prompt's group."""
    token_ids: Sequence[int]
    """The completion, stop token included; a prefill belongs to the prompt. Held as `array("i")`."""
    logprobs: Sequence[float]
    """Of each completion token, under the sampling distribution. Held as `array("f")`."""
    finish_reason: FinishReason
    policy_version: int = 0
    """Optimizer updates in the weights that its first token was sampled with."""
    routed_experts: Any | None = None
    """p + c - 1 x moe layers x k expert ids of prompt and completion, where the engine records them. A tensor
    of one byte an id, two above 256 experts. The last token has none, because no layer read it."""
    max_tokens: int = 0
    """Limit of completion tokens that it was sampled under; 0 = not recorded."""
    text: str | None = None
    """The completion as text, where an endpoint returns no token ids; its `token_ids` are then zeros."""
    last_version: int = -1
    """As `policy_version`, of its last token: later where weights changed meanwhile. -1 = the same."""
    observed: tuple[tuple[int, int], ...] = ()
    """First and end index in the completion of each observation, which an environment wrote between turns. It
    was not sampled: its log-probabilities are 0, and it is out of the loss."""
    score: float | None = None
    """The environment's own reward, where it gave one."""
    failure: str = ""
    """Why the environment failed; such a rollout is dropped from the loss, as one whose verifier failed."""

    def __post_init__(self) -> None:
        if self.last_version < 0:
            object.__setattr__(self, "last_version", self.policy_version)
        for name, code in (("token_ids", "i"), ("logprobs", "f")):
            value = getattr(self, name)
            if not isinstance(value, array) or value.typecode != code:
                object.__setattr__(self, name, array(code, value))

    @property
    def sampled(self) -> int:
        """Completion tokens that the model sampled."""
        return len(self.token_ids) - sum(end - first for first, end in self.observed)

    @property
    def turns(self) -> list[tuple[bool, Sequence[int]]]:
        """The completion in order: whether the model wrote a part, and its token ids."""
        cuts = [0, *(at for span in self.observed for at in span), len(self.token_ids)]
        parts = zip(itertools.cycle((True, False)), itertools.pairwise(cuts), strict=False)
        return [(own, self.token_ids[first:end]) for own, (first, end) in parts]


@dataclass(frozen=True, slots=True)
class Graded:
    """A rollout with its reward, every part kept for the log."""

    rollout: Rollout
    text: str
    """The completion as graded: the template's prefill, then the tokens without the stop token."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Unweighted value of each reward by name; a reward whose verifier failed has no entry."""
    reward: float = 0.0
    """The weighted sum of `parts`; undefined when the verdict is `error`."""
    verdict: Verdict = "incorrect"
    """Of the accuracy reward. `error`: a reward's verifier failed; the rollout is dropped and counted."""
    detail: str = ""
