"""Any dense causal language model of transformers, behind the packed interface of `Transformer`.

Students and small public policies are Llama- or Qwen-shaped. transformers is imported on use only, so
`import model` stays light.

Axes    b rows, s tokens, d width
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from model.layout import packed_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class DensePolicy(nn.Module):
    """`network`, a transformers causal language model, with packed rows in and states out."""

    def __init__(self, network: "PreTrainedModel") -> None:
        super().__init__()
        self.network = network
        self.config = network.config

    @property
    def lm_head(self) -> nn.Linear:
        """States (.. d) to logits (.. vocab)."""
        head = self.network.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        return head

    def forward(self, token_ids: Tensor) -> Tensor:
        """Logits, see `logits`."""
        return self.logits(token_ids)

    def logits(self, token_ids: Tensor) -> Tensor:
        """Next-token logits (b s vocab) of `token_ids` (b s), a sequence a row."""
        return self.lm_head(self.hidden(token_ids))

    def hidden(
        self, token_ids: Tensor, positions: Tensor | None = None, sequence_ids: Tensor | None = None
    ) -> Tensor:
        """Final-normed states (b s d); arguments as for `Transformer.hidden`.

        Where the sequences of a packed row start is told by a whole (b 1 s s) mask: the one form that every
        architecture and attention of transformers takes as it is.
        """
        mask = None
        if sequence_ids is not None:  # added to the scores: what all attentions of transformers understand
            seen = packed_mask(sequence_ids)
            mask = torch.zeros(seen.shape, dtype=self.network.dtype, device=seen.device)
            mask.masked_fill_(~seen, float("-inf"))
        out = self.network.base_model(
            input_ids=token_ids, attention_mask=mask, position_ids=positions, use_cache=False
        )
        return out.last_hidden_state

    def num_parameters(self, *, active: bool = False) -> int:
        """Weights; every one of them is active in a dense model."""
        return sum(p.numel() for p in self.parameters())


def load_dense(
    path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> DensePolicy:
    """The model in directory `path`, as transformers reads it."""
    from transformers import AutoModelForCausalLM

    policy = DensePolicy(AutoModelForCausalLM.from_pretrained(path, dtype=dtype))
    return policy.to(device)


def save_dense(policy: DensePolicy, path: str | Path) -> None:
    """Write a directory that `load_dense`, transformers and vLLM read."""
    policy.network.save_pretrained(path)
