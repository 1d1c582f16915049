"""DeepSeek-V3 from token ids to next-token states, for training, and with a cache for decoding.

Five ways through the same layers:

    hidden            packed rows, expanded attention        training, scoring
    hidden_and_mtp    the same, with the MTP modules         pretraining
    prefill           prompts, fills a cache                 the first token of a rollout
    decode            new tokens, absorbed attention         every further one
    draft             the same, for the first MTP module     a guess at the one after

All return states, not logits: over a large vocabulary the caller decides which positions need them.

Papers  DeepSeek-V3  arXiv:2412.19437  Sec. 2
Axes    b rows, s tokens of a row, p tokens of a prompt, d width, k experts per token
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute_later

from model import checkpoint
from model.cache import DecodeStep, LatentCache, LayerCache, Rows
from model.config import ModelConfig
from model.decoder import DecoderLayer
from model.kernels.layout import Layout
from model.kernels.packed import Packed
from model.layers import RMSNorm
from model.moe import MoE, load_metrics
from model.mtp import MTPModule
from model.policy import Head, Policy
from model.rope import Rope
from model.sizes.native import native_shape

PREFILL_CHUNK = 2048  # tokens of a prompt in one forward


class Transformer(Policy):
    """The network, in fp32 and freshly initialized; `model.load` reads a checkpoint instead.

    Weights are N(0, initializer_range) by a generator of their own from `seed` (None = a seed from torch's
    global one), norms 1, biases of the gates 0."""

    engine, routed = "native", True
    config: ModelConfig
    # nn.ModuleList has no item type: these annotations are for readers and type checkers.
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
        self.recompute = False
        if self.norm.weight.device.type != "meta":
            self._initialize(seed)

    @torch.no_grad()
    def _initialize(self, seed: int | None) -> None:
        generator = torch.Generator(self.norm.weight.device)
        generator.manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)
        for parameter in self.parameters():
            if parameter.dim() > 1:  # the one-dimensional ones are norms
                parameter.normal_(0.0, self.config.initializer_range, generator=generator)

    @classmethod
    def load(
        cls, path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> "Transformer":
        """The network of a public deepseek_v3 checkpoint directory, in `dtype` on `device`.
        Raises `CheckpointError`: files that are missing or broken, or that the config does not describe."""
        config = checkpoint.read_config(Path(path))
        tensors = checkpoint.StoredTensors(Path(path))
        config = checkpoint.without_missing_mtp(config, tensors)
        with torch.device("meta"):
            net = cls(config)
        net.to(dtype).to_empty(device=device)
        if config.tie_word_embeddings:  # to_empty allocates a tensor for each of them
            net.lm_head.weight = net.embed_tokens.weight
        for moe in net.moe_layers():
            moe.gate.load.zero_()  # no checkpoint has the counts
        checkpoint.fill(net.state_dict(keep_vars=True), config, tensors)
        checkpoint.check_finite(net.named_parameters(), path)
        return net

    def save(self, path: str | Path, fp8: bool = False) -> None:
        """Write a directory that `load`, transformers and vLLM read.

        `fp8` writes linear layers and experts in FP8 blocks, as the release does: half of bf16's size."""
        checkpoint.save(self.state_dict(keep_vars=True), self.config, path, fp8)

    @property
    def head(self) -> Head:
        return Head(self.lm_head.weight)

    def public_weights(self) -> Iterator[tuple[str, Tensor]]:
        return checkpoint.trunk_weights(self.state_dict(keep_vars=True), self.config)

    def hidden(
        self, token_ids: Tensor, packed: Packed | None = None, routed_experts: Tensor | None = None
    ) -> Tensor:
        layout = self._layout(token_ids, packed)
        x = self.embed_tokens(token_ids)
        first = self.config.first_k_dense_replace
        for i, layer in enumerate(self.layers):
            recorded = None if routed_experts is None or i < first else routed_experts[:, :, i - first]
            if self.recompute and torch.is_grad_enabled():
                contexts = partial(_recomputing, layer)
                x = recompute_later(layer, x, layout, recorded, use_reentrant=False, context_fn=contexts)
            else:
                x = layer(x, layout, recorded)
        return self.norm(x)

    def mtp_states(
        self, hidden: Tensor, token_ids: Tensor, packed: Packed | None = None, detached: bool = False
    ) -> list[Tensor]:
        """As `Policy.mtp_states`, of modules k = 1 .. D.

        At position i the head predicts token i + 1 from the trunk's state and token i + 1 + k from module
        k's, which has also seen tokens i + 1 to i + k. The last k states of a sequence know no such token
        (they read into the next sequence, or around the row's end): the caller leaves them out."""
        if not len(self.mtp):
            return []
        layout, states = self._layout(token_ids, packed), []
        state = hidden.detach() if detached else hidden
        for k, module in enumerate(self.mtp, start=1):
            embedded = self.embed_tokens(token_ids.roll(-k, dims=1))
            state = module.predict(state, embedded.detach() if detached else embedded, layout)
            states.append(state)
        return states

    def _layout(self, token_ids: Tensor, packed: Packed | None) -> Layout:
        (b, s), most, device = token_ids.shape, self.config.max_position_embeddings, token_ids.device
        longest = s if packed is None else packed.longest
        if longest > most:
            raise ValueError(f"A sequence of {longest} tokens is longer than max_position_embeddings={most}.")
        rotations = self.rope.first(s, device) if packed is None else self.rope(packed.positions)
        learning = self.training and torch.is_grad_enabled()  # rollouts and evaluation are not counted
        balance = learning and self.balance_alpha > 0
        made = Layout.of(rotations, packed or Packed.of([s] * b, device), learning, balance)
        return made._replace(replay=self.router_replay)

    def check_routes(self, routed_experts: Any, tokens: int) -> None:
        shape, experts = (tokens - 1, *self.config.routed_shape), self.config.n_routed_experts
        if tuple(routed_experts.shape) != shape:
            found = " x ".join(map(str, routed_experts.shape))
            raise ValueError(f"{found} ids, not {' x '.join(map(str, shape))} (tokens, layers, experts)")
        low, high = map(int, torch.aminmax(routed_experts)) if routed_experts.numel() else (0, 0)
        if low < 0 or high >= experts:
            raise ValueError(f"ids from {low} to {high}, and its layers have experts 0 to {experts - 1}")

    def new_cache(self, rows: int, max_tokens: int, **options: Any) -> LatentCache:
        """An empty cache for `rows` of up to `max_tokens`; `options` as in `LatentCache`."""
        return LatentCache(self.config, rows, max_tokens, self.norm.weight, **options)

    @torch.no_grad()
    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        cache: LatentCache,
        rows: Rows | None = None,
        chunk: int = PREFILL_CHUNK,
    ) -> Tensor:
        """Read prompts into empty rows of `cache`; final-normed state (b d) of each prompt's last token.

        Prompts are laid end to end, so short ones do not pay for long ones. Longer ones than `chunk` are read
        piece by piece: memory does not grow with them. `rows` None = the first b of the cache."""
        rows = np.arange(len(prompts)) if rows is None else rows
        first = [prompt[:chunk] for prompt in prompts]
        lengths = np.array([len(prompt) for prompt in first])
        for row, length in zip(rows, lengths, strict=True):
            if not cache.reserve(np.array([row]), int(length)):
                raise ValueError(f"The cache is full: no page is free for a prompt of {length} tokens.")
        cache.lengths[rows] = lengths
        device = self.norm.weight.device
        tokens = torch.tensor([i for prompt in first for i in prompt], device=device)[None]  # 1 N
        packed = Packed.of(lengths.tolist(), device)
        layout = Layout.of(self.rope(packed.positions), packed)._replace(slots=cache.slots(rows))
        x = self.embed_tokens(tokens)
        for layer, part in zip(self.layers, self._caches(cache), strict=True):
            x = layer(x, layout, cache=part)
        x = self.norm(x)
        if self._drafts(cache):
            following = [i for prompt in prompts for i in _following(prompt, 0, chunk)]
            embedded = self.embed_tokens(torch.tensor(following, device=device)[None])
            self.mtp[0].predict(x, embedded, layout, cache.layer(len(self.layers)))
        states = x[0, packed.ends[1:] - 1]  # b d
        for i, prompt in enumerate(prompts):
            for begin in range(chunk, len(prompt), chunk):
                tokens = torch.tensor([prompt[begin : begin + chunk]], device=device)
                step = cache.append(rows[i : i + 1], tokens.shape[1])
                x = self.decode(tokens, cache, step)
                states[i] = x[0, -1]
                if self._drafts(cache):
                    following = _following(prompt, begin, chunk)
                    self.draft(x, torch.tensor([following], device=device), cache, step)
        return states

    @torch.no_grad()
    def decode(self, token_ids: Tensor, cache: LatentCache, step: DecodeStep | None = None) -> Tensor:
        """Append tokens to rows of `cache`; their final-normed states (b s d), for `token_ids` (b s).

        `step` is from `cache.append` for those rows. None = all rows of the cache."""
        if step is None:
            step = cache.append(np.arange(len(cache.lengths)), token_ids.shape[1])
        rotations = self.rope(step.positions)
        x = self.embed_tokens(token_ids)
        for layer, part in zip(self.layers, self._caches(cache), strict=True):
            x = layer.decode(x, rotations, step, part)
        return self.norm(x)

    @torch.no_grad()
    def draft(self, states: Tensor, token_ids: Tensor, cache: LatentCache, step: DecodeStep) -> Tensor:
        """States (b s d) of the first MTP module, from which the head guesses one token further: from the
        trunk's final-normed `states` (b s d) at the positions of `step`, and the tokens after those (b s)."""
        rotations, embedded = self.rope(step.positions), self.embed_tokens(token_ids)
        return self.mtp[0].draft(states, embedded, rotations, step, cache.layer(len(self.layers)))

    def _drafts(self, cache: LatentCache) -> bool:
        return len(cache.latent) > len(self.layers)

    def _caches(self, cache: LatentCache) -> list[LayerCache]:
        return [cache.layer(i, self.config.first_k_dense_replace) for i in range(len(self.layers))]

    def num_parameters(self, *, active: bool = False) -> int:
        """Weights, MTP modules included. `active`: those of the trunk that one token meets."""
        return native_shape(self.config).parameters.active if active else super().num_parameters()

    def moe_layers(self) -> list[MoE]:
        """The mixtures of experts in order, those of the MTP modules last."""
        return [layer.mlp for layer in (*self.layers, *self.mtp) if isinstance(layer.mlp, MoE)]

    def router_load(self) -> Tensor:
        """Tokens each expert received in training since `update_router_bias` (moe layers, experts)."""
        loads = [moe.gate.load for moe in self.moe_layers()]
        return torch.stack(loads) if loads else torch.zeros(0, self.config.n_routed_experts, dtype=torch.long)

    def update_router_bias(self, gamma: float) -> None:
        """Step every gate's bias by `gamma` against its load (the paper: 0.001) and set the load to 0."""
        for moe in self.moe_layers():
            moe.gate.update_bias(gamma)

    def after_update(self, gamma: float) -> dict[str, float]:
        """The load of each layer's router, and the share of experts that differ from those recorded, as
        metrics; then `update_router_bias`."""
        metrics = load_metrics(self.router_load().cpu().float())
        if found := [moe.differing for moe in self.moe_layers() if moe.differing is not None]:
            differ, compared = torch.stack(found).sum(0).tolist()
            metrics["policy/experts_differ"] = differ / max(1, compared)
        for moe in self.moe_layers():
            moe.differing = None
        self.update_router_bias(gamma)
        return metrics

    def pop_balance_loss(self) -> Tensor:
        """alpha * balance loss (Eq. 17), summed over layers and forwards since the last call."""
        losses = [moe.balance_loss for moe in self.moe_layers() if moe.balance_loss is not None]
        for moe in self.moe_layers():
            moe.balance_loss = None
        return self.balance_alpha * sum(losses, start=self.norm.weight.new_zeros((), dtype=torch.float))


def _following(prompt: Sequence[int], begin: int, chunk: int) -> list[int]:
    """The tokens after those at `begin` to `begin` + `chunk`. For the last of a prompt 0, until
    `Transformer.draft` overwrites its slot."""
    return [*prompt[begin + 1 : begin + chunk + 1], 0][: len(prompt[begin : begin + chunk])]


def _recomputing(layer: DecoderLayer) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a checkpointed layer's first and second forward: the second does not count."""

    @contextmanager
    def second() -> Iterator[None]:
        layer.mlp.recomputing = True  # no module but a mixture of experts reads it
        try:
            yield
        finally:
            layer.mlp.recomputing = False

    return nullcontext(), second()
