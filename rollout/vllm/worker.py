"""What runs in vLLM's workers: weights are loaded there bucket by bucket, and fingerprinted.

vLLM's layerwise reload, the same from 0.20 to 0.33, restores a layer's tensors as a checkpoint has them,
collects its weights, and converts it when it is complete; `tests/vllm/test_contract.py` holds the names.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rollout.transport import Receiver
from rollout.weights import fingerprint, live_fingerprints


class WorkerWeights:
    """Methods that vLLM adds to its worker class (`worker_extension_cls`)."""

    device: torch.device
    model_runner: Any
    model_config: Any
    vllm_config: Any
    r1_receiver: Receiver

    def r1_begin(self) -> None:
        """Prepare the model for weights by public name."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        repack_experts_on_reload()
        watch_packing()
        self.r1_receiver = Receiver(self.device)
        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(self.model_runner.get_model())

    @torch.no_grad()
    def r1_bucket(self, message: bytes) -> int:
        """Load a bucket, unless it is not what was sent; the fingerprint of what arrived."""
        from vllm.config import set_current_vllm_config

        tensors, found = self.r1_receiver.read(message)
        with set_current_vllm_config(self.vllm_config):
            self.model_runner.get_model().load_weights(tensors)
        return found

    def r1_end(self) -> dict[str, int]:
        """Convert what is left. The fingerprint of each tensor that this worker computes with, by path."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        self.r1_receiver.close()
        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(self.model_runner.get_model(), self.model_config)
        return self.r1_live()

    def r1_live(self) -> dict[str, int]:
        """The fingerprint of each tensor that this worker computes with, by path."""
        return live_fingerprints(self.model_runner.get_model())


def watch_packing() -> None:
    """CPU: store each matrix's fingerprint before it is packed for the GEMM library."""
    from vllm.model_executor.layers import utils

    def watched(pack: Callable[..., None], layer: nn.Module, remove_weight: bool) -> None:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        if not weight.is_meta and weight.ndim == 2:
            layer.r1_packed = fingerprint([weight])  # type: ignore[assignment]
        pack(layer, remove_weight)

    pack = utils.dispatch_cpu_unquantized_gemm
    if not isinstance(pack, functools.partial):
        utils.dispatch_cpu_unquantized_gemm = functools.partial(watched, pack)


def repack_experts_on_reload() -> None:
    """CPU: pack experts on every load, not on the first alone (vLLM 0.32, `_setup_kernel`).

    Without this the kernel reads plain weights as packed ones from the second load on."""
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
        UnquantizedFusedMoEMethod as Method,
    )
    from vllm.platforms import current_platform

    original = Method._setup_kernel
    if not current_platform.is_cpu() or hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def setup(self: Any, layer: Any, w13: Tensor, w2: Tensor) -> None:
        again = self.moe_kernel is not None
        original(self, layer, w13, w2)
        if again:
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    Method._setup_kernel = setup
