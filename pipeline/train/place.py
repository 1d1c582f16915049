"""Where a stage computes: the device, and what makes its numbers reproducible there."""

import random
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from pipeline.errors import UserError
from pipeline.settings.common import ComputeSettings, TrainSettings

MICRO_TOKENS = {"cpu": 4096, "cuda": 16_384}
"""Tokens of one forward and backward, by type of device, where the settings leave it open."""


@dataclass(frozen=True, slots=True)
class Place:
    """The device of policy, reference, optimizer and micro-batches."""

    device: torch.device

    @classmethod
    def open(cls, config: ComputeSettings) -> Self:
        """Seed every generator and choose the device.

        On a CPU the same seed gives the same bits; torch would also fill each new tensor with NaN, which
        takes a tenth of a step, and nothing reads it. On a GPU torch's deterministic algorithms are slower
        and still leave attention's backward as it is, so they stay off.
        Raises `UserError`: no GPU where one was asked for."""
        place = cls(device_named(config.device))
        seed_all(config.seed, config.threads)
        torch.use_deterministic_algorithms(place.device.type == "cpu", warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        return place

    def micro_tokens(self, config: TrainSettings) -> int:
        """Most tokens of one forward and backward."""
        return config.micro_tokens or MICRO_TOKENS[self.device.type]


def seed_all(seed: int, threads: int) -> None:
    """Seed every generator, and set torch's CPU threads; 0 = one a core."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if threads:
        torch.set_num_threads(threads)


def device_named(name: str) -> torch.device:
    """The device of a setting: `auto` is the GPU where there is one.
    Raises `UserError`: `cuda` where torch finds no GPU, with the reason that can be found."""
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        why = "no GPU is visible" if torch.version.cuda else f"torch {torch.__version__} is a CPU build"
        raise UserError(f"--device cuda: torch finds no GPU here ({why}); set --device cpu, or auto")
    return torch.device("cuda" if found and name != "cpu" else "cpu")
