"""DeepSeek-V3 from token ids to next-token states, for training, and with a cache for decoding.

Four ways through the same layers:

    hidden            packed rows, expanded attention        training, scoring
    hidden_and_mtp    the same, with the MTP modules         pretraining
    prefill           prompts, fills a cache                 the first token of a rollout
    decode            one token a row, absorbed attention    every further one

All return states, not logits: over a large vocabulary the caller decides which positions need them.

Papers  DeepSeek-V3  arXiv:2412.19437  Sec. 2
Axes    b rows, s tokens of a row, p tokens of a prompt, d width, k experts per token
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .cache import DecodeStep, LatentCache
from .config import ModelConfig
from .decoder import DecoderLayer
from .layers import RMSNorm
from .layout import Layout
from .moe import MoE
from .mtp import MTPModule
from .rope import Rope


class Transformer(nn.Module):
    """The network, in fp32 and freshly initialized; `model.load` reads a checkpoint instead.

    Weights are N(0, initializer_range), norms 1, biases of the gates 0.

    Args:
        config: the sizes.
        seed: of the initial weights, drawn from a generator of their own. None = from torch's global one.
    """

    # nn.ModuleList forgets what it holds; these say it to readers and type checkers.
    layers: Sequence[DecoderLayer]
    mtp: Sequence[MTPModule]

    def __init__(self, config: ModelConfig, seed: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.rope = Rope(config)
        trunk, modules = config.num_hidden_layers, config.num_nextn_predict_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = [DecoderLayer(config, i, self.rope) for i in range(trunk)]
        self.layers = nn.ModuleList(layers)  # type: ignore[assignment]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        mtp = [MTPModule(config, trunk + i, self.rope) for i in range(modules)]
        self.mtp = nn.ModuleList(mtp)  # type: ignore[assignment]
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.balance_alpha = 0.0
        """Weight of the sequence-wise balance loss (Eq. 17). 0 = it is not computed. The paper: 1e-4."""
        self.recompute = False
        """Activation checkpointing: the backward computes each trunk layer again (arXiv:1604.06174)."""
        if self.norm.weight.device.type != "meta":
            self._initialize(seed)

    @torch.no_grad()
    def _initialize(self, seed: int | None) -> None:
        generator = torch.Generator(self.norm.weight.device)
        generator.manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)
        for parameter in self.parameters():
            if parameter.dim() > 1:  # the one-dimensional ones are norms
                parameter.normal_(0.0, self.config.initializer_range, generator=generator)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Logits, see `logits`."""
        return self.logits(token_ids)

    def logits(self, token_ids: Tensor) -> Tensor:
        """Next-token logits (b s vocab) of `token_ids` (b s), a sequence a row."""
        return self.lm_head(self.hidden(token_ids))

    def hidden(
        self,
        token_ids: Tensor,
        positions: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        routed_experts: Tensor | None = None,
    ) -> Tensor:
        """Final-normed states (b s d) of packed rows; `lm_head` turns them into logits.

        Args:
            token_ids: `b s`.
            positions: `b s`, of a token in its own sequence. None = 0 .. s - 1 in every row.
            sequence_ids: `b s`; a token sees the earlier tokens of its row with its own id. -1 = padding,
                whose states mean nothing. None = a row is one sequence.
            routed_experts: `b s moe_layers k`, recorded expert choices to repeat, as
                `LatentCache.routed_experts` gives them; -1 = route afresh. None = route everything afresh.
        """
        layout = self._layout(token_ids, positions, sequence_ids)
        x = self.embed_tokens(token_ids)
        first = self.config.first_k_dense_replace
        for i, layer in enumerate(self.layers):
            replay = None if routed_experts is None or i < first else routed_experts[:, :, i - first]
            if self.recompute and torch.is_grad_enabled():
                contexts = partial(_recomputing, layer)
                x = checkpoint(layer, x, layout, replay, use_reentrant=False, context_fn=contexts)
            else:
                x = layer(x, layout, replay)
        return self.norm(x)

    def hidden_and_mtp(
        self, token_ids: Tensor, positions: Tensor | None = None, sequence_ids: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """States of the trunk (b s d), and of each MTP module k = 1 .. D (b s d); arguments as for `hidden`.

        At position i the head predicts token i + 1 from the trunk's state and token i + 1 + k from module
        k's, which has also seen tokens i + 1 to i + k. The last k states of a sequence know no such token
        (they read into the next sequence, or around the row's end): the caller masks them.
        """
        state = hidden = self.hidden(token_ids, positions, sequence_ids)
        if not len(self.mtp):
            return hidden, []
        layout, states = self._layout(token_ids, positions, sequence_ids), []
        for k, module in enumerate(self.mtp, start=1):
            state = module.predict(state, self.embed_tokens(token_ids.roll(-k, dims=1)), layout)
            states.append(state)
        return hidden, states

    def _layout(self, token_ids: Tensor, positions: Tensor | None, sequence_ids: Tensor | None) -> Layout:
        s, most = token_ids.shape[1], self.config.max_position_embeddings
        if positions is None and s > most:
            raise ValueError(f"A row of {s} tokens is longer than max_position_embeddings={most}.")
        rotations = self.rope.first(s, token_ids.device) if positions is None else self.rope(positions)
        learning = self.training and torch.is_grad_enabled()  # rollouts and evaluation leave no trace
        balance = learning and self.balance_alpha > 0
        return Layout.of(rotations, token_ids, sequence_ids, learning, balance)

    def new_cache(self, batch: int, max_tokens: int, record_routes: bool = False) -> LatentCache:
        """An empty cache for `batch` rows of up to `max_tokens`; `record_routes` keeps expert choices too."""
        return LatentCache.empty(self.config, batch, max_tokens, self.norm.weight, record_routes)

    @torch.no_grad()
    def prefill(self, token_ids: Tensor, lengths: Tensor, cache: LatentCache) -> Tensor:
        """Read prompts into `cache`; final-normed state (b d) of each prompt's last token.

        Args:
            token_ids: `b p`, padded on the right with any token.
            lengths: `b`, tokens that count, 1 to p.
            cache: of b rows; what it held is overwritten.
        """
        if token_ids.shape[1] > cache.max_tokens:
            raise ValueError(
                f"Prompts of {token_ids.shape[1]} tokens do not fit a cache of {cache.max_tokens}."
            )
        # Padding sits after the tokens that count, so the causal mask already hides it from them; the
        # columns it leaves in the cache lie beyond `lengths` until decoding overwrites them.
        layout = Layout.of(self.rope.first(token_ids.shape[1], token_ids.device), token_ids)
        x = self.embed_tokens(token_ids)
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            x = layer(x, layout, cache=layer_cache)
        cache.lengths, cache.longest = lengths.clone(), int(lengths.max())
        return self.norm(x[torch.arange(len(x), device=x.device), lengths - 1])

    @torch.no_grad()
    def decode(self, token_ids: Tensor, cache: LatentCache) -> Tensor:
        """Append one token to every row of `cache`; its final-normed state (b d), for `token_ids` (b)."""
        if cache.longest >= cache.max_tokens:
            raise ValueError(f"The cache is full: a row holds {cache.longest} of {cache.max_tokens} tokens.")
        step = DecodeStep.after(cache, self.rope(cache.lengths))
        x = self.embed_tokens(token_ids)
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            x = layer.decode(x, step, layer_cache)
        cache.lengths = cache.lengths + 1
        cache.longest += 1
        return self.norm(x)

    def num_parameters(self, *, active: bool = False) -> int:
        """Weights, MTP modules included. `active`: those of the trunk that one token meets."""
        if not active:
            return sum(p.numel() for p in self.parameters())
        total = sum(p.numel() for name, p in self.named_parameters() if not name.startswith("mtp."))
        share = self.config.num_experts_per_tok / self.config.n_routed_experts
        routed = sum(
            p.numel() for moe in self.moe_layers()[: -len(self.mtp) or None] for p in moe.experts.parameters()
        )
        return total - round(routed * (1 - share))

    def moe_layers(self) -> list[MoE]:
        """The mixtures of experts in order, those of the MTP modules last."""
        return [layer.mlp for layer in (*self.layers, *self.mtp) if isinstance(layer.mlp, MoE)]

    def router_load(self) -> Tensor:
        """Tokens each expert received in training since `update_router_bias` (moe layers, experts)."""
        loads = [moe.gate.load for moe in self.moe_layers()]
        return torch.stack(loads) if loads else torch.zeros(0, self.config.n_routed_experts, dtype=torch.long)

    def update_router_bias(self, gamma: float) -> None:
        """Step every gate's bias by `gamma` against its load (the paper: 0.001) and start counting anew."""
        for moe in self.moe_layers():
            moe.gate.update_bias(gamma)

    def pop_balance_loss(self) -> Tensor:
        """alpha * balance loss (Eq. 17), summed over layers and forwards since the last call."""
        losses = [moe.balance_loss for moe in self.moe_layers() if moe.balance_loss is not None]
        for moe in self.moe_layers():
            moe.balance_loss = None
        return self.balance_alpha * sum(losses, start=self.norm.weight.new_zeros((), dtype=torch.float))


def _recomputing(layer: DecoderLayer) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a checkpointed layer's first and second forward: the second leaves no trace in the gate."""

    @contextmanager
    def second() -> Iterator[None]:
        moe = layer.mlp
        if isinstance(moe, MoE):
            moe.recomputing = True
        try:
            yield
        finally:
            if isinstance(moe, MoE):
                moe.recomputing = False

    return nullcontext(), second()
