"""Where a stage computes: the device, and what makes its numbers reproducible there."""

import random
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from pipeline.errors import UserError
from pipeline.settings.common import ComputeSettings


@dataclass(frozen=True, slots=True)
class Place:
    """The device of policy, reference, optimizer and micro-batches."""

    device: torch.device

    @classmethod
    def open(cls, config: ComputeSettings) -> Self:
        """Seed every generator and choose the device.

        On a CPU the same seed gives the same bits. On a GPU torch's deterministic algorithms are slower and
        still leave attention's backward as it is, so they stay off.

        Raises:
            UserError: no GPU where one was asked for.
        """
        random.seed(config.seed)
        np.random.seed(config.seed % 2**32)
        torch.manual_seed(config.seed)
        if config.threads:
            torch.set_num_threads(config.threads)
        place = cls(device_named(config.device))
        torch.use_deterministic_algorithms(place.device.type == "cpu", warn_only=True)
        return place


def device_named(name: str) -> torch.device:
    """The device of a setting: `auto` is the GPU where there is one.

    Raises:
        UserError: `cuda` where torch finds no GPU, with the reason that can be found.
    """
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        build = f"torch {torch.__version__} is a CPU build" if torch.version.cuda is None else "no GPU is visible"
        raise UserError(f"--device cuda: torch finds no GPU here ({build}); set --device cpu, or auto")
    return torch.device("cuda", torch.cuda.current_device()) if found and name != "cpu" else torch.device("cpu")
