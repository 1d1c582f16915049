"""Any dense causal language model of transformers, as a `Policy` that computes what transformers computes.

Students and small public policies are Llama- or Qwen-shaped. `import model` leaves this file out, because
transformers takes seconds to import.

transformers looks up its attention by name. PACKED is ours: packed rows go to `model.kernels.attend`, which
knows where sequences end and needs no mask; what an engine computes with its cache goes to transformers' own.
An architecture that this would change is refused: before it trains or scores, a policy is compared with its
network's plain attention on a few tokens.

Axes    b rows, s tokens, d width; in an attention h query heads, g key heads, q queries, k keys
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging

from model.checkpoint import check_finite, quantized_tensor
from model.kernels.attend import attend
from model.kernels.packed import Packed
from model.policy import Head, Policy

PACKED = "r1_packed"
LAYERS = {"full_attention", "sliding_attention"}
"""Types of layers that packing keeps."""
STRETCHED = {"dynamic", "longrope"}
"""Types of rotary positions that transformers stretches by the longest sequence of a row."""
CHECKED = (5, 16)
"""Lengths of the sequences of random tokens on which a policy is compared with its network."""


class DensePolicy(Policy):
    """`network`, a transformers causal language model, with packed rows in and states out.

    Trains without dropout, whatever the architecture's own: a policy whose log-probabilities are noise cannot
    be compared with itself."""

    engine = "dense"

    def __init__(self, network: PreTrainedModel) -> None:
        super().__init__()
        self.network, self.training = network, network.training
        self.config: Any = network.config.get_text_config()
        self._compared = False
        for module in network.modules():
            for name, value in list(vars(module).items()):
                drops = name.endswith(("dropout", "pdrop", "layerdrop")) or isinstance(module, nn.Dropout)
                if drops and isinstance(value, float):
                    setattr(module, name, 0.0)
            if _is_rms_norm(module):
                module.__dict__["forward"] = MethodType(_rms_norm, module)
        if self._whole.config._attn_implementation == "sdpa":
            self._whole.set_attn_implementation(PACKED)

    @classmethod
    def load(
        cls, path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> "DensePolicy":
        """The model in directory `path`, as transformers reads it, in evaluation mode.
        Raises `OSError` or `ValueError`: no model there that transformers can read."""
        return cls(read_network(path, dtype=dtype, device_map={"": device}))

    @property
    def _whole(self) -> PreTrainedModel:
        """The network without the wrapper of adapters."""
        net: Any = self.network
        return net.get_base_model() if hasattr(net, "peft_config") else net

    @property
    def head(self) -> Head:
        """See `Policy.head`: with the scale and the soft cap of the architecture."""
        out: Any = self._whole.get_output_embeddings()
        times, over = (getattr(self.config, name, None) or 1.0 for name in ("logit_scale", "logits_scaling"))
        softcap = getattr(self.config, "final_logit_softcapping", None)
        return Head(out.weight, getattr(out, "bias", None), times / over, softcap)

    @property
    def recompute(self) -> bool:
        """Activation checkpointing, in training mode alone: transformers' own.
        Raises `ValueError`: switched on for an architecture for which transformers has none."""
        return self.network.is_gradient_checkpointing

    @recompute.setter
    def recompute(self, on: bool) -> None:
        if on:
            self.network.gradient_checkpointing_enable({"use_reentrant": False})
        elif self.recompute:
            self.network.gradient_checkpointing_disable()

    def train(self, mode: bool = True) -> Self:
        """As of any module.
        Raises `ValueError`: an architecture that would not be computed exactly, by name and reason."""
        if mode and not self._compared:
            self._compare()
        return super().train(mode)

    def hidden(
        self, token_ids: Tensor, packed: Packed | None = None, routed_experts: Tensor | None = None
    ) -> Tensor:
        """See `Policy.hidden`; there are no routes to repeat. Raises `ValueError`: as `train`."""
        if not self._compared:
            self._compare()
        b, s = token_ids.shape
        return self._states(token_ids, packed or Packed.of([s] * b, token_ids.device))

    def _states(self, token_ids: Tensor, packed: Packed) -> Tensor:
        # A mask of four axes goes to the layers as it is: transformers makes none, and looks for no padding.
        unused = torch.zeros(1, 1, 1, 1, dtype=self.network.dtype, device=token_ids.device)
        out = self._whole.get_decoder()(
            input_ids=token_ids.view(1, -1),
            attention_mask=unused,
            position_ids=packed.positions,
            use_cache=False,
            packed=packed,
        )
        states: Tensor = out.last_hidden_state
        return states.view(*token_ids.shape, -1)

    def _compare(self) -> None:
        """Compare states and logits with those of the network's plain attention, a sequence at a time.

        In training mode, so that what is random there is found as well. Raises `ValueError`: see `train`."""
        net, training = self._whole, self.network.training
        before, name = net.config._attn_implementation, type(net).__name__
        if net.device.type == "meta":
            return
        ids = torch.arange(sum(CHECKED), device=net.device)[None] % self.config.vocab_size
        found: list[Tensor] = []
        hook = net.get_decoder().register_forward_hook(lambda _, __, out: found.append(out.last_hidden_state))

        def alone(attention: str) -> tuple[Tensor, Tensor]:
            net.set_attn_implementation(attention)
            logits = torch.cat([net(input_ids=x, use_cache=False).logits for x in ids.split(CHECKED, 1)], 1)
            return torch.cat(found[-len(CHECKED) :], 1), logits

        try:
            self.network.train()
            kinds = set(getattr(self.config, "layer_types", None) or ()) - LAYERS
            if kinds:
                raise ValueError(f"it has layers of type {', '.join(sorted(kinds))}")
            given = getattr(self.config, "rope_parameters", None) or {}
            ropes = {str(of.get("rope_type")) for of in (given, *given.values()) if isinstance(of, dict)}
            if stretched := ropes & STRETCHED:
                raise ValueError(f"a row's longest sequence sets its rotary positions ({min(stretched)})")
            with torch.no_grad():
                states, logits = alone("eager")
                again, _ = alone(PACKED)
                if net.config._attn_implementation != PACKED:
                    raise ValueError("its attention cannot be exchanged")
                packed = self._states(ids, Packed.of(CHECKED, net.device))
                _near("states", again, states)
                _near("states of packed sequences", packed, states)
                _near("logits", self.head(states), logits)
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            net.set_attn_implementation(before)
            raise ValueError(f"{name} cannot be trained or scored here: {error}.") from error
        finally:
            hook.remove()
            self.network.train(training)
        self._compared = True

    def public_weights(self) -> Iterator[tuple[str, Tensor]]:
        embedding = self.network.get_input_embeddings().weight
        for name, tensor in self.network.state_dict(keep_vars=True).items():
            if not (name.startswith("lm_head.") and tensor is embedding):
                yield name, tensor.detach()

    def save(self, path: str | Path) -> None:
        self.network.save_pretrained(path)


def read_network(path: str | Path, **options: Any) -> PreTrainedModel:
    """The model in directory `path`, as transformers reads it with `options`, all of its weights from there.
    Raises `OSError` or `ValueError`: no model there that transformers can read, or tensors that do not fit:
    it would leave random weights in their stead."""
    logging.disable_progress_bar()  # it would cut through the caller's own lines
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a report of what is refused below
    try:
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        found: Any = AutoModelForCausalLM.from_pretrained(path, **options)
        net, info = cast("tuple[PreTrainedModel, dict[str, set[Any]]]", found)
    except Exception as error:  # a damaged config makes its checks and layers raise anything
        why = str(error).partition("\n")[0]  # a list of all models comes after it
        raise ValueError(f"transformers cannot read it: {why or type(error).__name__}") from error
    finally:
        logging.set_verbosity(verbosity)
    first, modules = (getattr(net.config, f"num_{of}", 0) for of in ("hidden_layers", "nextn_predict_layers"))
    mtp = tuple(f"model.layers.{first + k}." for k in range(modules))  # transformers has none
    wrong = [f"{name} is {tuple(has)}, not {tuple(due)}" for name, has, due in info["mismatched_keys"]]
    wrong += [f"{name} is missing" for name in info["missing_keys"]]
    wrong += [f"{name} is not the model's" for name in info["unexpected_keys"] if not name.startswith(mtp)]
    if getattr(net.config, "quantization_config", None) is None and (name := quantized_tensor(Path(path))):
        wrong.append(f"{name} is quantized, without a quantization_config")
    if wrong:
        raise ValueError(f"{len(wrong)} tensors do not fit its config.json; the first: {min(wrong)}")
    check_finite(net.named_parameters(), path)
    return net


def _is_rms_norm(module: Any) -> bool:
    """Whether `module` computes what a kernel of torch does; in Gemma's the weight is added to 1."""
    if not type(module).__name__.endswith("RMSNorm") or list(dict(module.named_parameters())) != ["weight"]:
        return False
    x = 1e-3 * torch.arange(2.0 * len(module.weight), device="cpu").sin().view(2, -1)  # so that eps counts
    own = functional_call(module, {"weight": x[1]}, (x,))
    eps = getattr(module, "variance_epsilon", None) or module.eps
    return torch.allclose(own, F.rms_norm(x, x.shape[1:], x[1], eps))


def _rms_norm(self: Any, x: Tensor) -> Any:
    """Of transformers: on a GPU one kernel each way, where its own forward is eight."""
    if not x.is_cuda or x.dtype != self.weight.dtype:
        return type(self).forward(self, x)
    return F.rms_norm(x, self.weight.shape, self.weight, getattr(self, "variance_epsilon", None) or self.eps)


def _near(what: str, ours: Tensor, theirs: Tensor) -> None:
    """Raises `ValueError`: they differ by more than rounding."""
    most = torch.finfo(theirs.dtype).eps ** 0.5
    gap = float((ours - theirs).abs().max() / theirs.abs().max())
    if gap > most:
        raise ValueError(f"its {what} differ from its own forward's by {gap:.0e}; rounding: below {most:.0e}")


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    packed: Packed | None = None,
    **parts: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention of transformers: `query` (b h q d) to `key` (b g k d) over `value` (b g k e): (b q h e).
    Raises `ValueError`: packed, with a part that `attend` does not have."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    parts["dropout"] = 0.0
    beyond = [name for name in ("s_aux", "position_bias") if parts.get(name) is not None]
    if packed is not None:
        if beyond:
            raise ValueError(f"its attention has {beyond[0]}")
        window = _window(module, parts.get("sliding_window"))
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # 1 h s d -> s h d
        return attend(q, k, v, packed, scale, window, parts.get("softcap"))[None], None
    if attention_mask is not None and attention_mask.numel() == 1 < key.shape[2]:
        raise ValueError("its layers do not pass on where sequences end")
    how: Callable[..., tuple[Tensor, Tensor | None]] = sdpa_attention_forward
    if beyond or parts.get("softcap") is not None:  # SDPA would leave it out
        how = sys.modules[type(module).__module__].eager_attention_forward
        seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        seen = seen.tril(key.shape[2] - query.shape[2]) if attention_mask is None else attention_mask
        attention_mask = torch.zeros_like(seen, dtype=query.dtype).masked_fill_(~seen, float("-inf"))
    return how(module, query, key, value, attention_mask, scaling=scale, **parts)


def _window(module: Any, passed: int | None) -> int | None:
    """Tokens that a token of this layer sees. Where the config has types of layers, they decide.
    Raises `ValueError`: the attention is not causal, or its window is not that of the config."""
    config = module.config
    if not getattr(module, "is_causal", True) or getattr(config, "use_bidirectional_attention", False):
        raise ValueError("its attention is not causal")
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if kinds is not None and kinds[module.layer_idx] != "sliding_attention":
        window = None
    if window != passed:
        raise ValueError(f"its attention has a window of {passed} tokens, its config of {window}")
    return window


AttentionInterface.register(PACKED, _attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
