"""The shape of a DeepSeek-V3 network: the fields of a public `config.json`, checked.

Field names and meanings are those of the released configuration (github.com/deepseek-ai/DeepSeek-V3),
and the default of a field is that of transformers' `DeepseekV3Config`, so the same file describes the same
network here and there. `ModelConfig.from_dict` refuses unknown fields and values of another architecture: a
silently ignored field is a network that is nearly, but not quite, the trained one.

Papers  DeepSeek-V3  arXiv:2412.19437  Sec. 4.2 (sizes)
        Moonlight    arXiv:2502.16982  (a smaller model of the same architecture)
        YaRN         arXiv:2309.00071
"""

import difflib
from dataclasses import asdict, dataclass, fields
from typing import Any

# Keys that do not change the network's function, or that `to_dict` derives again.
_BOOKKEEPING = {
    *("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version"),
    *("attn_implementation", "chunk_size_feed_forward", "use_cache", "return_dict"),
    *("output_attentions", "output_hidden_states", "output_router_logits", "is_encoder_decoder"),
    *("id2label", "label2id", "problem_type", "head_dim", "qk_head_dim", "quantization_config"),
    *("aux_loss_alpha", "seq_aux", "ep_size", "pretraining_tp", "unsloth_version", "unsloth_fixed"),
}

# Keys with one value that this architecture means; any other value is another architecture.
_FIXED = {
    "model_type": "deepseek_v3",
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "attention_bias": False,
    "attention_dropout": 0.0,
}

_YARN_REQUIRED = ("factor", "original_max_position_embeddings")
_YARN_DEFAULTS = {"beta_fast": 32, "beta_slow": 1, "mscale": 0.0, "mscale_all_dim": 0.0}  # 0 = not given


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of the network. Defaults: DeepSeek-V3 as transformers' `DeepseekV3Config` states it."""

    vocab_size: int = 129280
    """Rows of the embedding and of the output head."""
    hidden_size: int = 7168
    """Width d of the residual stream."""
    intermediate_size: int = 18432
    """Inner width of the dense feed-forward layers."""
    moe_intermediate_size: int = 2048
    """Inner width of one routed (or shared) expert."""
    num_hidden_layers: int = 61
    """Decoder layers of the trunk, MTP modules not counted."""
    num_attention_heads: int = 128
    """Attention heads h; MLA has no separate count of key and value heads."""
    n_shared_experts: int = 1
    """Experts that every token visits, fused into one feed-forward layer of n times the inner width."""
    n_routed_experts: int = 256
    """Experts e that the gate chooses from."""
    num_experts_per_tok: int = 8
    """Experts k that a token is sent to."""
    n_group: int = 8
    """Groups that the experts are split into, one per node in training. 1 = no grouping."""
    topk_group: int = 4
    """Groups that a token's experts may come from."""
    norm_topk_prob: bool = True
    """Divide a token's gate values by their sum."""
    routed_scaling_factor: float = 2.5
    """Multiplies the gate values after normalization."""
    first_k_dense_replace: int = 3
    """Leading layers with a dense feed-forward instead of experts."""
    q_lora_rank: int | None = 1536
    """Rank of the query compression. None = one full-rank `q_proj`."""
    kv_lora_rank: int = 512
    """Rank of the shared key-value latent, what the cache holds per token beside the rotary key."""
    qk_nope_head_dim: int = 128
    """Query and key dimensions per head without position."""
    qk_rope_head_dim: int = 64
    """Query dimensions per head, and dimensions of the one shared key, that RoPE rotates."""
    v_head_dim: int = 128
    """Value dimensions per head."""
    num_nextn_predict_layers: int = 1
    """Multi-token-prediction modules D after the trunk. 0 = none."""
    max_position_embeddings: int = 4096
    """Longest sequence, tokens."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: dict[str, Any] | None = None
    """YaRN parameters. None = plain RoPE."""
    rope_interleave: bool = True
    """Rotary pairs are neighbours (0, 1), (2, 3) .. as released. False = (0, r/2), (1, r/2 + 1) .."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square in every norm of width d."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    tie_word_embeddings: bool = False
    """The output head is the embedding."""
    bos_token_id: int | None = 0
    """First token of a document. None = there is none."""
    eos_token_id: int | list[int] | None = 1
    """Token, or any of several, that ends a document."""
    pad_token_id: int | None = None
    """Padding, which no loss counts."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rope_scaling", _yarn(self.rope_scaling))
        for name in (
            *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers"),
            *("num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
            *("n_shared_experts", "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group"),
            "max_position_embeddings",
        ):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} is not a positive integer.")
        if (rank := self.q_lora_rank) is not None and rank < 1:
            raise ValueError(f"q_lora_rank={rank} is not positive. For a full-rank query use null.")
        if not 0 <= (dense := self.first_k_dense_replace) <= (layers := self.num_hidden_layers):
            raise ValueError(f"first_k_dense_replace={dense} is not within num_hidden_layers={layers}.")
        if (modules := self.num_nextn_predict_layers) < 0:
            raise ValueError(f"num_nextn_predict_layers={modules} is negative; 0 = none.")
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim={self.qk_rope_head_dim} is odd; RoPE rotates pairs.")
        self._check_groups()

    def _check_groups(self) -> None:
        e, k, groups, best = self.n_routed_experts, self.num_experts_per_tok, self.n_group, self.topk_group
        if e % groups:
            raise ValueError(f"n_routed_experts={e} cannot be split into n_group={groups} equal groups.")
        size = e // groups
        if groups > 1 and size < 2:
            raise ValueError(
                f"n_group={groups} leaves {size} expert a group; a group's score is the sum of its best two."
            )
        if best > groups:
            raise ValueError(f"topk_group={best} is more than the n_group={groups} there are.")
        if k > best * size:
            raise ValueError(
                f"num_experts_per_tok={k} is more than the {best * size} experts of topk_group={best} groups "
                f"of {size}."
            )

    @property
    def qk_head_dim(self) -> int:
        """Query and key dimensions per head, rotated or not."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Numbers the cache holds per token and layer: the key-value latent and the rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def routed_shape(self) -> tuple[int, int]:
        """Expert choices of a token in the trunk: layers that have experts, and experts of each."""
        return self.num_hidden_layers - self.first_k_dense_replace, self.num_experts_per_tok

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """Read a public `config.json`."""
        known = [f.name for f in fields(cls)]
        # Those that begin with `_` are other libraries'.
        values = {key: x for key, x in values.items() if not (key in _BOOKKEEPING or key.startswith("_"))}
        for key, fixed in _FIXED.items():
            found = values.pop(key, fixed)
            if found is not None and found != fixed:
                raise ValueError(f"{key}={found!r} is not supported: this architecture has {key}={fixed!r}.")
        if "num_mtp_layers" in values:  # transformers' own name for it
            values.setdefault("num_nextn_predict_layers", values.pop("num_mtp_layers"))
        kv_heads = values.pop("num_key_value_heads", None)
        heads = values.get("num_attention_heads", cls.num_attention_heads)
        if kv_heads is not None and kv_heads != heads:
            raise ValueError(
                f"num_key_value_heads={kv_heads} contradicts num_attention_heads={heads}: latent attention "
                "gives every head keys and values of its own."
            )
        _merge_rope_parameters(values)
        for key in (key for key in values if key not in known):
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ValueError(f"{key!r} is not a field of a deepseek_v3 config. The nearest one: {near!r}.")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """A `config.json` that transformers' `DeepseekV3ForCausalLM` and vLLM load."""
        added = {
            "architectures": ["DeepseekV3ForCausalLM"],
            "num_key_value_heads": self.num_attention_heads,
            "rope_scaling": {"type": "yarn"} | self.rope_scaling if self.rope_scaling else None,
        }
        return asdict(self) | _FIXED | added


def _yarn(scaling: dict[str, Any] | None) -> dict[str, Any] | None:
    """Complete YaRN parameters with their defaults, without the type; None where there is no scaling."""
    if scaling is None:
        return None
    scaling = dict(scaling)
    kinds = {scaling.pop(key, None) for key in ("type", "rope_type")} - {None}
    if kinds == {"default"}:
        return None
    if not kinds <= {"yarn"}:
        raise ValueError(f"rope_scaling of type {sorted(kinds)} is not supported: it is 'yarn' or null.")
    for key in _YARN_REQUIRED:
        if scaling.get(key) is None:
            raise ValueError(f"rope_scaling lacks {key!r}, which YaRN needs.")
    known = (*_YARN_REQUIRED, *_YARN_DEFAULTS)
    for key in (key for key in scaling if key not in known):
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
        raise ValueError(f"rope_scaling has an unknown {key!r}. The nearest YaRN parameter: {near!r}.")
    return _YARN_DEFAULTS | {key: value for key, value in scaling.items() if value is not None}


def _merge_rope_parameters(values: dict[str, Any]) -> None:
    """Turn transformers 5's `rope_parameters` into `rope_theta` and `rope_scaling`, in place."""
    parameters = dict(values.pop("rope_parameters", None) or {})
    if not parameters:
        return
    theta = parameters.pop("rope_theta", None)
    if theta is not None and (other := values.setdefault("rope_theta", theta)) != theta:
        raise ValueError(f"rope_parameters' rope_theta={theta} contradicts rope_theta={other}.")
    scaling = _yarn(parameters)
    if values.get("rope_scaling") is None:
        values["rope_scaling"] = scaling
    elif _yarn(values["rope_scaling"]) != scaling:
        raise ValueError("rope_parameters and rope_scaling contradict each other; keep one.")
