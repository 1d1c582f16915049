"""Any dense causal language model of transformers, as a `Policy`.

Students and small public policies are Llama- or Qwen-shaped. `import model` leaves this file out, because
transformers takes seconds to import.

Axes    b rows, s tokens, d width
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from model.kernels.packed import Packed
from model.policy import Head, Policy


class DensePolicy(Policy):
    """`network`, a transformers causal language model, with packed rows in and states out."""

    engine = "dense"

    def __init__(self, network: PreTrainedModel) -> None:
        super().__init__()
        self.network, self.training = network, network.training
        self.config: Any = network.config.get_text_config()

    @classmethod
    def load(
        cls, path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> "DensePolicy":
        """The model in directory `path`, as transformers reads it, in evaluation mode.

        Raises:
            OSError, ValueError: no model there that transformers can read.
        """
        logging.disable_progress_bar()  # it would cut through the caller's own lines
        return cls(AutoModelForCausalLM.from_pretrained(path, dtype=dtype, device_map={"": device}))

    @property
    def head(self) -> Head:
        """See `Policy.head`."""
        return Head(self.network.get_output_embeddings().weight)

    @property
    def recompute(self) -> bool:
        """Activation checkpointing, in training mode alone: transformers' own.

        Raises:
            ValueError: switched on for an architecture for which transformers has none.
        """
        return self.network.is_gradient_checkpointing

    @recompute.setter
    def recompute(self, on: bool) -> None:
        if on:
            self.network.gradient_checkpointing_enable({"use_reentrant": False})
        elif self.recompute:
            self.network.gradient_checkpointing_disable()

    def hidden(self, token_ids: Tensor, packed: Packed | None = None) -> Tensor:
        """Stand-in until packed attention is merged."""
        mask, positions = None, None
        if packed is not None:
            seen = (packed.index[:, None] == packed.index).tril()[None, None]
            mask = torch.zeros(seen.shape, dtype=self.network.dtype, device=seen.device)
            mask.masked_fill_(~seen, float("-inf"))
            positions = packed.positions
        out = self.network.base_model(
            input_ids=token_ids, attention_mask=mask, position_ids=positions, use_cache=False
        )
        return out.last_hidden_state

    def public_weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `Policy.public_weights`."""
        embedding = self.network.get_input_embeddings().weight
        for name, tensor in self.network.state_dict(keep_vars=True).items():
            if not (name.startswith("lm_head.") and tensor is embedding):
                yield name, tensor.detach()

    def save(self, path: str | Path) -> None:
        """See `Policy.save`."""
        self.network.save_pretrained(path)
