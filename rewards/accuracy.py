"""The accuracy reward: is the final answer right? The only reward whose verifier needs a worker process."""

from dataclasses import dataclass

from rewards.maths.extract import Mode, final_answer
from rewards.maths.grade import grade_math, normalise
from rewards.pool import WorkerPool
from rewards.programs.grade import extract_code, run_tests
from rewards.registry import Outcome, reward
from rollout.types import Problem


@dataclass(frozen=True)
class Accuracy:
    """1 or 0, or for code with `partial_credit` the share of tests passed (arXiv:2501.12948, Sec. 2.2.2).

    `mode` is that of `rewards.maths.extract`. Programs run in `pool`, or the shared one."""

    mode: Mode = "strict"
    partial_credit: bool = False
    pool: WorkerPool | None = None

    def __call__(self, problem: Problem, completion: str) -> Outcome:
        outcome, extracted = self.quick(problem, completion)
        if outcome is not None:
            return outcome
        assert extracted is not None  # `quick` settles all but programs
        shown, partial = problem.shown, self.partial_credit
        return run_tests(extracted, problem.tests, partial_credit=partial, shown=shown, pool=self.pool)

    def quick(self, problem: Problem, completion: str) -> tuple[Outcome | None, str | None]:
        """The outcome where it takes no worker, else `None`; and the answer or program found."""
        if problem.kind == "code":
            code = extract_code(completion)
            return (Outcome(0.0, "no program") if code is None else None), code
        answer = final_answer(completion, self.mode)
        if answer is None:
            return Outcome(0.0, "no final answer"), None
        if problem.kind == "math":
            return grade_math(problem.answer, answer), answer
        same = normalise(answer).casefold() == normalise(problem.answer).casefold()
        return Outcome(float(same), "equal as written" if same else "different", answer), answer


reward("accuracy", "share of rollouts whose answer is right")(Accuracy())
