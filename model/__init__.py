"""The network: DeepSeek-V3's architecture in native PyTorch, and its public checkpoints.

`load` and `save` move weights between a `Transformer` and a directory that transformers and vLLM read.
`Policy` is what all models of this project have in common; `model.dense` adds those of transformers.
"""

from model.cache import LatentCache
from model.checkpoint import CheckpointError
from model.config import ModelConfig
from model.policy import Policy
from model.sizes.published import DEEPSEEK_V3, MOONLIGHT_16B, TINY
from model.transformer import Transformer

load, save = Transformer.load, Transformer.save

__all__ = ["DEEPSEEK_V3", "MOONLIGHT_16B", "TINY", "CheckpointError", "LatentCache", "ModelConfig", "Policy"]
__all__ += ["Transformer", "load", "save"]
