"""Multi-token prediction: module k reads the state at i and token i + k, and predicts token i + k + 1.

DeepSeek-V3, arXiv:2412.19437, Sec. 2.2, as the released weights have it:

    h'_i = W [norm(Emb(t_(i+k))) ; norm(h_i)]      eh_proj, enorm, hnorm       (Eq. 21, halves swapped)
    h_i  = norm(layer(h'_i))                       shared_head.norm            (Eq. 22)
    P(t_(i+k+1)) = softmax(head(h_i))              the trunk's head            (Eq. 23)

Eq. 21 writes the state first and the embedding second; the released `eh_proj` has the embedding's columns
first, which is what counts. The state of the trunk goes in after its final norm, and a module's after its
`shared_head.norm`, as transformers feeds them (vLLM too, for the one module there is).

Axes    b rows, s tokens, d width
"""

import torch
from torch import Tensor, nn

from model.cache import DecodeStep, LayerCache
from model.config import ModelConfig
from model.decoder import DecoderLayer
from model.kernels.layout import Layout
from model.layers import RMSNorm
from model.rope import Rope


class MTPModule(DecoderLayer):
    """A decoder layer that starts from a state and the token after it. Embedding and head are the trunk's."""

    def __init__(self, config: ModelConfig, index: int, rope: Rope) -> None:
        super().__init__(config, index, rope)
        d, eps = config.hidden_size, config.rms_norm_eps
        self.enorm, self.hnorm = RMSNorm(d, eps), RMSNorm(d, eps)
        self.eh_proj = nn.Linear(2 * d, d, bias=False)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(d, eps)})

    def predict(
        self, state: Tensor, embedding: Tensor, layout: Layout, cache: LayerCache | None = None
    ) -> Tensor:
        """Normed state (b s d) for the head, from the previous `state` and the `embedding` of token i + k."""
        return self.shared_head["norm"](self(self._join(state, embedding), layout, cache=cache))

    def draft(
        self, state: Tensor, embedding: Tensor, rotations: Tensor, step: DecodeStep, cache: LayerCache
    ) -> Tensor:
        """As `predict`, for new tokens (b s d) over what `cache` remembers."""
        x = self.decode(self._join(state, embedding), rotations, step, cache)
        return self.shared_head["norm"](x)

    def _join(self, state: Tensor, embedding: Tensor) -> Tensor:
        return self.eh_proj(torch.cat([self.enorm(embedding), self.hnorm(state)], dim=-1))
