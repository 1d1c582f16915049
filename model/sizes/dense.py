"""Counts of dense models, from the text config that transformers has of them; transformers is not imported.

Beside their sizes, architectures differ in the number of norms, in which products have a bias, and in whether
the feed-forward is gated.

Axes    d width, q widths of all query heads, k of all key heads, i inner width of the feed-forward
"""

from dataclasses import dataclass
from typing import Any

from model.sizes.shape import Kept, Parameters, Shape


@dataclass(frozen=True, slots=True)
class Kind:
    """An architecture. A string in place of a bool names the config's own switch."""

    gated: bool = True
    norms: int = 2
    """Norms of a layer as wide as the network."""
    norm_vectors: int = 1
    """Weights of a norm per dimension: 2 with a bias."""
    fused: bool = True  # the norms, on a GPU: `model.dense`
    head_norms: bool | str = False
    """Norms of queries and keys."""
    qkv_bias: bool | str = False
    out_bias: bool | str = False
    mlp_bias: bool | str = False
    head_bias: bool = False
    positions: bool = False
    """Learnt embeddings of positions."""


_BIASED: dict[str, Any] = {"norm_vectors": 2, "qkv_bias": True, "out_bias": True, "mlp_bias": True}
_SWITCHED: dict[str, Any] = {"qkv_bias": "attention_bias", "out_bias": "attention_bias"}
KINDS = {
    "llama": Kind(**_SWITCHED, mlp_bias="mlp_bias"),
    "mistral": Kind(),
    "qwen2": Kind(qkv_bias=True),
    "qwen3": Kind(**_SWITCHED, head_norms=True),
    "gemma2": Kind(**_SWITCHED, norms=4, fused=False),
    "gemma3_text": Kind(**_SWITCHED, norms=4, fused=False, head_norms=True),
    "granite": Kind(**_SWITCHED, mlp_bias="mlp_bias"),
    "cohere": Kind(**_SWITCHED, norms=1, fused=False),
    "phi": Kind(**_BIASED, gated=False, norms=1, head_bias=True),
    "gpt2": Kind(**_BIASED, gated=False, positions=True),
}
"""By `model_type`."""


def dense_shape(config: Any) -> Shape:
    """The shape of a dense model. Raises `ValueError`: an architecture that `KINDS` lacks."""
    kind = KINDS.get(config.model_type)
    if kind is None:
        raise ValueError(f"the sizes of {config.model_type!r} are not known; known are {', '.join(KINDS)}")

    def has(switch: bool | str) -> bool:
        return bool(getattr(config, switch, False)) if isinstance(switch, str) else switch

    d, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    size = getattr(config, "head_dim", None) or d // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    q, k = heads * size, key_heads * size
    i = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * d
    ups = 2 if kind.gated else 1
    products = d * (q + 2 * k) + q * d + (ups + 1) * d * i
    vectors = kind.norms * kind.norm_vectors * d
    vectors += (q + 2 * k if has(kind.qkv_bias) else 0) + (d if has(kind.out_bias) else 0)
    vectors += ups * i + d if has(kind.mlp_bias) else 0
    per_head = has(kind.head_norms)
    vectors += 2 * size if per_head else 0
    embeddings = config.vocab_size * d * (1 if config.tie_word_embeddings else 2)
    embeddings += config.max_position_embeddings * d if kind.positions else 0
    embeddings += config.vocab_size if kind.head_bias else 0
    total = layers * (products + vectors) + kind.norm_vectors * d + embeddings
    # RMSNorm keeps its input in fp32 and the normed value twice, torch's LayerNorm and kernel both once. The
    # feed-forward keeps all that it computes; GELU by tanh is several operators.
    own = 2 * kind.norms * d + (4 if kind.gated else 5) * i + 2 * (q + k) + (q + k if per_head else 0)
    wide = (kind.norms * d if kind.norm_vectors == 1 else 0) + (q + k if per_head else 0)
    kept = Kept(own, 0, on_cpus=wide) if kind.fused else Kept(own, wide)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers  # Mistral: all or none
    return Shape(
        parameters=Parameters(total, total, 0),
        width=d,
        vocab=config.vocab_size,
        products=layers * products,
        pair=2 * q,
        windows=tuple(window if kind == "sliding_attention" else None for kind in kinds),
        kept=(kept,) * layers,
    )
