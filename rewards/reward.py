"""Rewards by rule, and the weighted sum that keeps every part.

A reward has three outcomes: a value, or *the verifier failed*. A failure is never a silent 0: the
rollout is dropped from the loss and counted (`verdict == "error"`).

R1-Zero adds accuracy and format, R1's first RL stage also language consistency, summed directly
(arXiv:2501.12948, Sec. 2.2.2 and 2.3.2).
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

from rewards.format import in_format
from rewards.language import language_consistency
from rewards.maths.extract import Mode, final_answer
from rewards.maths.grade import grade_math, normalise, quick_grade
from rewards.outcome import Outcome, Reward
from rewards.pool import WorkerPool
from rewards.programs.grade import extract_code, run_tests
from rewards.repetition import repetition
from rollout.types import Graded, Problem, Rollout, Verdict

__all__ = ["Accuracy", "Format", "Language", "Outcome", "Reward", "RewardWeights", "Scorer", "verdict_of"]


def verdict_of(outcome: Outcome) -> Verdict:
    """`correct` only for full marks; partial credit is a reward, not a verdict."""
    if outcome.value is None:
        return "error"
    return "correct" if outcome.value == 1 else "incorrect"


class Accuracy:
    """Is the final answer right? Value 1 or 0, or for code with `partial_credit` the share of tests passed.

    Args:
        mode: How the answer is looked for, see `rewards.maths.extract`.
        partial_credit: Code only.
        pool: Where programs and slow mathematics run; default the process's shared pool.
    """

    name = "accuracy"

    def __init__(
        self, mode: Mode = "strict", partial_credit: bool = False, pool: WorkerPool | None = None
    ) -> None:
        self.mode: Mode = mode
        self.partial_credit = partial_credit
        self.pool = pool

    def __call__(self, problem: Problem, completion: str) -> Outcome:
        outcome, extracted = self.quick(problem, completion)
        if outcome is not None:
            return outcome
        assert extracted is not None  # `quick` settles completions without an answer
        if problem.kind == "code":
            return run_tests(extracted, problem.tests, partial_credit=self.partial_credit, pool=self.pool)
        return grade_math(problem.answer, extracted, pool=self.pool)

    def quick(self, problem: Problem, completion: str) -> tuple[Outcome | None, str | None]:
        """What can be said within microseconds and without a worker, if anything; and the answer found."""
        if problem.kind == "code":
            code = extract_code(completion)
            return (Outcome(0.0, "no program") if code is None else None), code
        answer = final_answer(completion, self.mode)
        if answer is None:
            return Outcome(0.0, "no final answer"), None
        if problem.kind == "math":
            return quick_grade(problem.answer, answer), answer
        same = normalise(answer).casefold() == normalise(problem.answer).casefold()
        return Outcome(float(same), "equal as written" if same else "different", answer), answer


class Format:
    """1 for one think block followed by one answer block and nothing else, else 0."""

    name = "format"

    def __call__(self, problem: Problem, completion: str) -> Outcome:
        return Outcome(float(in_format(completion)))


class Language:
    """Share of words in the problem's language, 0 .. 1."""

    name = "language"

    def __call__(self, problem: Problem, completion: str) -> Outcome:
        return Outcome(language_consistency(completion, problem.language, code=problem.kind == "code"))


class Repetition:
    """Less the share of n-grams that were said before, -1 .. 0."""

    name = "repetition"

    def __call__(self, problem: Problem, completion: str) -> Outcome:
        return Outcome(0.0 - repetition(completion))  # no -0.0 in the logs


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardWeights:
    """Weight of each part in the reward. Every part is computed and logged whatever its weight."""

    accuracy: float = 1.0
    """Of the final answer's correctness, 0 or 1 (code with partial credit: share of tests passed)."""
    format: float = 0.0
    """Of the think/answer format, 0 or 1. R1-Zero: 1.0 (arXiv:2501.12948, Sec. 2.2.2)."""
    language: float = 0.0
    """Of the share of words in the target language, 0 .. 1. R1's first RL stage: 1.0 (Sec. 2.3.2)."""
    repetition: float = 0.0
    """Of what is said again, -1 .. 0: less the share of 8-grams that occurred before. Not in R1."""


class Scorer:
    """Grade rollouts with accuracy, format, language and repetition, and add the parts up.

    Args:
        weights: Weight of each part.
        mode: How the final answer is looked for: `strict` to train, `lenient` to evaluate.
        partial_credit: Code earns the share of tests that it passes.
        workers: Child processes for programs and slow mathematics; default min(2, cpus).
    """

    def __init__(
        self,
        weights: RewardWeights,
        mode: Mode = "strict",
        partial_credit: bool = False,
        workers: int | None = None,
    ) -> None:
        self.weights = weights
        self._pool = WorkerPool(workers)
        self._threads: ThreadPoolExecutor | None = None
        self.accuracy = Accuracy(mode, partial_credit, self._pool)
        self._style: tuple[Reward, ...] = (Format(), Language(), Repetition())

    def grade(self, rollout: Rollout, text: str) -> Graded:
        """Grade one rollout whose completion, prefill included and stop token left out, reads `text`."""
        return self._assemble(rollout, text, self.accuracy(rollout.prompt.problem, text))

    def grade_all(self, pairs: Iterable[tuple[Rollout, str]]) -> list[Graded]:
        """Grade many, in order; programs and slow mathematics run side by side in the workers."""
        pairs = list(pairs)
        outcomes: list[Outcome | Future[Outcome]] = []
        for rollout, text in pairs:
            problem = rollout.prompt.problem
            quick, _ = self.accuracy.quick(problem, text)
            outcomes.append(
                quick if quick is not None else self._executor().submit(self.accuracy, problem, text)
            )
        return [
            self._assemble(rollout, text, outcome.result() if isinstance(outcome, Future) else outcome)
            for (rollout, text), outcome in zip(pairs, outcomes, strict=True)
        ]

    def close(self) -> None:
        """Stop the threads and the children. A closed scorer grades no more."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _executor(self) -> ThreadPoolExecutor:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self._pool.size, thread_name_prefix="rewards")
        return self._threads

    def _assemble(self, rollout: Rollout, text: str, accuracy: Outcome) -> Graded:
        problem = rollout.prompt.problem
        parts = {} if accuracy.value is None else {self.accuracy.name: accuracy.value}
        for reward in self._style:
            value = reward(problem, text).value
            assert value is not None  # only accuracy has a verifier that can fail
            parts[reward.name] = value
        weights = {
            "accuracy": self.weights.accuracy,
            "format": self.weights.format,
            "language": self.weights.language,
            "repetition": self.weights.repetition,
        }
        total = sum(weights[name] * value for name, value in parts.items())
        return Graded(rollout, text, parts, total, verdict_of(accuracy), accuracy.detail)
