"""What updates cost: tokens a second, share of a GPU's peak arithmetic, memory.

Paper   model FLOPs utilization (MFU)  PaLM, arXiv:2204.02311, App. B
"""

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch

from model.sizes.flops import flops, peak_flops, shape


class Usage:
    """The metrics of a policy's updates on one device."""

    def __init__(self, config: Any, device: torch.device, *, mtp: bool = False) -> None:
        """`config` is the policy's; `mtp`: its multi-token-prediction modules are trained too."""
        self.config, self.device, self.mtp = config, device, mtp
        self.peak: float | None = None  # FLOPs a second; unknown for a CPU, a GPU or an architecture
        if device.type == "cuda":
            with suppress(ValueError):
                shape(config)
                self.peak = peak_flops(torch.cuda.get_device_name(device))
            torch.cuda.reset_peak_memory_stats(device)

    def of(self, lengths: Iterable[int], seconds: float, scorings: int = 0) -> dict[str, float]:
        """Metrics of the updates on sequences of `lengths` tokens, which took `seconds`. `scorings` counts
        forwards without a backward over the same sequences, of policy or reference. All tokens count as
        turned into logits, prompts too."""
        lengths = list(lengths)
        metrics = {"time/trained_tokens_per_s": sum(lengths) / seconds}
        if self.peak:
            forward = flops(self.config, lengths, backward=False)
            work = flops(self.config, lengths, mtp=self.mtp) + scorings * forward
            metrics["time/mfu"] = work / seconds / self.peak
        if self.device.type == "cuda":
            metrics["memory/peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
            torch.cuda.reset_peak_memory_stats(self.device)
        return metrics
