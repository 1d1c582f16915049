"""What a trainer, an engine and a checkpoint need of a policy, native or dense.

`model.Transformer` and `model.dense.DensePolicy` are the two. Code that has a `Policy` need not know which:
what only one of them has is empty in the other, such as MTP states and router metrics.

Axes    b rows, s tokens of a row, d width
"""

import copy
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.kernels.packed import Packed


class PolicyConfig(Protocol):
    """The part of the config that both kinds have: rows of the head, and the longest sequence in tokens."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...


class Head(NamedTuple):
    """From final-normed states h to logits: softcap(scale * (W h + bias))."""

    weight: Tensor  # v d
    bias: Tensor | None = None  # v
    scale: float = 1.0  # Cohere multiplies logits, Granite divides them
    softcap: float | None = None  # c tanh(z / c), Gemma 2

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits (.. v) of states `hidden` (.. d)."""
        z = F.linear(hidden, self.weight, self.bias)
        z = z if self.scale == 1 else z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


class Policy(nn.Module):
    """A causal language model over packed rows: states first, logits only where a caller needs them."""

    engine: ClassVar[str]
    """Name of the in-process engine that generates from this kind of policy, see `rollout.open`."""
    routed: ClassVar[bool] = False  # has experts, whose load can be balanced
    config: PolicyConfig
    recompute: bool
    """Activation checkpointing: the backward computes each layer again (arXiv:1604.06174)."""
    router_replay: bool = True
    """`hidden` repeats the experts that an engine recorded (R3, arXiv:2510.11370); gate values, and their
    gradient, are those of its own affinities. Off: they are only compared with the gate's own choice."""
    balance_alpha: float = 0.0
    """Weight of the sequence-wise balance loss (DeepSeek-V3, Eq. 17), where the model has experts. 0 = it is
    not computed. The paper: 1e-4."""

    @classmethod
    @abstractmethod
    def load(
        cls, path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> "Policy":
        """The policy in checkpoint directory `path`, in `dtype` on `device`.
        Raises `OSError` or `ValueError`: no checkpoint there that this kind of policy reads."""

    def forward(self, token_ids: Tensor) -> Tensor:
        """Logits, see `logits`."""
        return self.logits(token_ids)

    def logits(self, token_ids: Tensor) -> Tensor:
        """Next-token logits (b s vocab) of `token_ids` (b s), a sequence a row."""
        return self.head(self.hidden(token_ids))

    @property
    @abstractmethod
    def head(self) -> Head:
        """What turns states into logits; its tensors are the policy's own."""

    @abstractmethod
    def hidden(
        self, token_ids: Tensor, packed: Packed | None = None, routed_experts: Tensor | None = None
    ) -> Tensor:
        """Final-normed states (b s d) of `token_ids` (b s); `head` turns them into logits.

        `packed` has the sequences of a single row (b = 1): a token sees the earlier tokens of its own. None =
        each row is one sequence. `routed_experts` (b s moe_layers k) are the choices that an engine recorded,
        see `router_replay`; -1, and None for all, = let the gate choose."""

    def mtp_states(
        self, hidden: Tensor, token_ids: Tensor, packed: Packed | None = None, detached: bool = False
    ) -> list[Tensor]:
        """States (b s d) of each multi-token-prediction module, from the trunk's states `hidden` (b s d) of
        `token_ids` (b s): none without modules. `detached`: no gradient reaches trunk and embedding."""
        return []

    def hidden_and_mtp(self, token_ids: Tensor, packed: Packed | None = None) -> tuple[Tensor, list[Tensor]]:
        """`hidden`, and `mtp_states` of it."""
        hidden = self.hidden(token_ids, packed)
        return hidden, self.mtp_states(hidden, token_ids, packed)

    def check_routes(self, routed_experts: Any, tokens: int) -> None:
        """Raise `ValueError` unless `routed_experts` may be what an engine recorded of this policy for a
        sequence of `tokens`: `Rollout.routed_experts`, on the host."""
        raise ValueError("it has no experts")

    def frozen(self) -> Self:
        """A copy that no update touches, for scoring."""
        return copy.deepcopy(self).eval().requires_grad_(False)

    def num_parameters(self, *, active: bool = False) -> int:
        """Weights. `active`: those that one token meets; in a dense model all of them."""
        return sum(p.numel() for p in self.parameters())

    def after_update(self, gamma: float) -> dict[str, float]:
        """What follows an optimizer update, such as a router's step of its bias by `gamma` against its load
        (0 = the bias stays); and metrics of it by name."""
        return {}

    def pop_balance_loss(self) -> Tensor:
        """`balance_alpha` * balance loss, summed over layers and forwards since the last call; a scalar."""
        return torch.zeros((), device=next(self.parameters()).device)

    @abstractmethod
    def public_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that generation needs, by the name in a public checkpoint, as views to read or write.

        MTP modules and a head that is tied to the embedding are left out."""

    @abstractmethod
    def save(self, path: str | Path) -> None:
        """Write a directory that the policy's `load`, transformers and vLLM read."""
