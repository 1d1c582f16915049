"""Bytes of a network in training, from its config."""

from typing import Any

from model.sizes.flops import shape


def training_bytes(
    config: Any,
    *,
    tokens: int,
    precision: str = "float32",
    moments: str = "float32",
    reference: bool = False,
    recompute: bool = False,
    device: str = "cuda",
) -> dict[str, int]:
    """What one process holds on its device while it trains; raises as `model.sizes.flops.shape`.

    The workspace of kernels and a chunk of logits come on top.

    Args:
        tokens: of the largest micro-batch.
        precision, moments: as `pipeline.settings.common.OptimSettings` has them.
        reference: a frozen copy of the policy stays beside it.
        recompute: layers keep their input alone, but for the one whose backward runs.
        device: `cuda` or `cpu`, whose kernels keep less.
    """
    of = shape(config)
    weights, own = of.parameters.total, 4 if precision == "float32" else 2
    layers = [kept.bytes(own, device) for kept in of.kept]
    a_token = own * of.width * len(layers) + max(layers) if recompute else sum(layers)
    return {
        "weights": own * weights,
        "masters": 0 if own == 4 else 4 * weights,
        "gradients": 4 * weights,
        "moments": 2 * weights * (2 if moments == "bfloat16" else 4),
        "reference": own * weights if reference else 0,
        "activations": tokens * a_token,
    }
