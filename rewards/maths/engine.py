"""What a worker is asked for mathematics."""

from collections.abc import Callable

from rewards.maths.compare import compare


def equivalent(gold: str, answer: str, stage: Callable[[str], None]) -> tuple[float | None, str]:
    """`compare`; the stages are those of a child that is killed when it takes too long."""
    stage("answer")
    return compare(gold, answer)


def load() -> None:
    """Nothing is loaded late."""
