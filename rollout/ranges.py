"""Settings with ranges: a range is part of a field's type and is checked when a group is built.

    steps: Count = 40                              at least 1
    top_p: Annotated[float, Range(0, 1, open_low=True)] = 1.0

Standard library only. A test walks every numeric setting of every stage with values outside its range.
"""

import functools
import math
import typing
from dataclasses import dataclass
from typing import Annotated, Any


@dataclass(frozen=True, slots=True)
class Range:
    """An interval of numbers; NaN lies in none."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    """`low` itself is outside."""
    open_high: bool = False
    """`high` itself is outside."""

    def holds(self, value: float) -> bool:
        """Whether `value` lies inside."""
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below and math.isfinite(value)

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'above' if self.open_low else 'at least'} {self.low:g}"
        left, right = "(" if self.open_low else "[", ")" if self.open_high else "]"
        return f"in {left}{self.low:g}, {self.high if self.high > 2**53 else f'{self.high:g}'}{right}"


Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
MOST_SAMPLES = 65_536  # of a prompt: more only fill the memory
Samples = Annotated[int, Range(1, MOST_SAMPLES)]
Threads = Annotated[int, Range(0, 1_024)]  # OpenMP crashes the process where it cannot start them all
Seed = Annotated[int, Range(0, 2**63 - 1)]
Positive = Annotated[float, Range(0, open_low=True)]
NotNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]


@functools.cache
def ranges(settings: Any) -> dict[str, Range]:
    """The range of each field of a settings class that has one, by the field's name."""
    found = {}
    for name, hint in typing.get_type_hints(settings, include_extras=True).items():
        for part in (hint, *typing.get_args(hint)):  # Optional[Annotated[..]] has its range one level down
            for extra in getattr(part, "__metadata__", ()):
                if isinstance(extra, Range):
                    found[name] = extra
    return found


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A group of settings. A subclass with a `__post_init__` of its own calls this one first."""

    def __post_init__(self) -> None:
        """Raises `ValueError`: a number outside its range, by the name of its setting."""
        for name, allowed in ranges(type(self)).items():  # type: ignore[arg-type]
            value: Any = getattr(self, name)
            if value is not None and not allowed.holds(value):
                raise ValueError(f"{name}={value} must be {allowed}.")
