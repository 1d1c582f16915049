"""Group-relative advantages: a rollout is judged against the other answers to its own prompt.

Papers  GRPO      arXiv:2402.03300  Sec. 4.1.2 (mean and standard deviation of the group)
        Dr. GRPO  arXiv:2503.20783  Sec. 3.1 (the division by the deviation favours easy and hard prompts)
"""

import math
from collections.abc import Sequence
from typing import Literal

Scale = Literal["std", "none"]


def group_advantages(rewards: Sequence[float | None], scale: Scale) -> list[float | None]:
    """Advantages of one group's rollouts: reward less group mean, over the standard deviation for `std`.

    A reward is None where the verifier failed: such a rollout is left out of the mean and its advantage is
    None. The deviation is the population's, as in GRPO. A group without spread gets zeros."""
    valid = [r for r in rewards if r is not None]
    mean = math.fsum(valid) / max(1, len(valid))
    spread = math.sqrt(math.fsum((r - mean) ** 2 for r in valid) / max(1, len(valid)))
    if spread < 1e-8:
        return [None if r is None else 0.0 for r in rewards]
    unit = spread if scale == "std" else 1.0
    return [None if r is None else (r - mean) / unit for r in rewards]
