"""Decode steps from CUDA graphs: all kernels of a step launched at once, where launching takes the time.

A graph has fixed shapes, so rows and pages are rounded up to powers of two; padding rows write to page 0, the
padding page, and their results are not read. A graph reads weights and cache at the addresses of its capture:
it sees updates in place, and a new cache or network needs new graphs.

Axes    b rows of a step, s new tokens of each; R and n, rows and pages a row of a graph; d width
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.cache import PAGE, DecodeStep, Group, LatentCache
from model.scale.fp8 import Fp8Experts
from model.transformer import Transformer

WARMUPS = 2  # runs before a capture, in which libraries allocate memory that a capture does not allow


@dataclass(slots=True)
class Static:
    """A step's inputs at fixed addresses, and the replay that returns its states."""

    tokens: Tensor  # R s
    step: DecodeStep
    replay: Callable[[], Tensor]  # -> R s d


def capturable(net: Transformer) -> bool:
    """Whether a decode step of `net` stays on the GPU, as a captured graph must.

    torch's grouped product is one kernel for bf16 on Hopper and Blackwell alone; elsewhere it copies the
    experts' row counts to the host (GroupedBlas.cpp), and so does `model.scale.fp8`."""
    weight = net.embed_tokens.weight
    if weight.device.type != "cuda" or weight.dtype != torch.bfloat16:
        return False
    if any(isinstance(module, Fp8Experts) for module in net.modules()):
        return False
    return torch.cuda.get_device_capability(weight.device)[0] in (9, 10)


class DecodeGraphs:
    """`Transformer.decode` for one network and one cache."""

    def __init__(self, net: Transformer, cache: LatentCache, capture: bool = True) -> None:
        """`capture=False` runs the kernels one by one on the same padded inputs: for tests without a GPU."""
        self.net, self.cache, self.capture = net, cache, capture
        self.graphs: dict[tuple[int, int, int], Static] = {}
        self.pool = torch.cuda.graph_pool_handle() if capture else None

    def decode(self, token_ids: Tensor, step: DecodeStep) -> Tensor:
        """States (b s d) of `token_ids` (b s); `step` has one group, of all rows."""
        (b, s), columns = token_ids.shape, step.groups[0].mask.shape[-1]
        key = (power_of_two(b), s, power_of_two(columns // PAGE))
        if key not in self.graphs:
            self.graphs[key] = self._static(*key)
        static = self.graphs[key]
        fill(static, token_ids, step)
        return static.replay()[:b].clone()

    def _static(self, rows: int, s: int, pages: int) -> Static:
        latent = self.cache.latent
        zeros = torch.zeros(rows, s, dtype=torch.long, device=latent.device)
        mask = latent.new_full((rows, 1, s, pages * PAGE), float("-inf"))
        mask[..., 0] = 0.0  # a softmax over nothing would be NaN
        group = Group(0, rows, zeros.new_zeros(rows * pages), mask)
        scratch = latent.new_empty(rows * pages * PAGE, latent.shape[2])
        step = DecodeStep(zeros.clone(), zeros.clone(), [group], scratch)
        static = Static(zeros, step, lambda: self.net.decode(zeros, self.cache, step))
        if self.capture:
            static.replay = self._captured(static.replay)
        return static

    def _captured(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARMUPS):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Another thread may allocate meanwhile: the trainer, where rollouts overlap with it.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            out = run()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


def fill(static: Static, token_ids: Tensor, step: DecodeStep) -> None:
    """Copy a step to the inputs of a graph; further rows and pages are padding."""
    (group,), (fixed,) = step.groups, static.step.groups
    b, columns = len(token_ids), group.mask.shape[-1]
    pairs = zip((static.tokens, *static.step[:2]), (token_ids, *step[:2]), strict=True)
    for to, values in pairs:  # tokens, positions, slots
        to[:b].copy_(values)
        to[b:].zero_()
    table = fixed.pages.view(len(static.tokens), -1).zero_()
    table[:b, : columns // PAGE].copy_(group.pages.view(b, -1))
    fixed.mask.fill_(float("-inf"))
    fixed.mask[:b, ..., :columns].copy_(group.mask)
    fixed.mask[b:, ..., 0] = 0.0


def power_of_two(n: int) -> int:
    """The next power of two that is not smaller."""
    return 1 << max(0, n - 1).bit_length()
