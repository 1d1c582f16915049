"""The network: DeepSeek-V3's architecture in native PyTorch, and its public checkpoints.

`load` and `save` move weights between a `Transformer` and a directory that transformers and vLLM read.
"""

from model.cache import LatentCache
from model.checkpoint import CheckpointError, load, save
from model.config import DEEPSEEK_V3, MOONLIGHT_16B, TINY, ModelConfig
from model.transformer import Transformer

__all__ = [
    "DEEPSEEK_V3",
    "MOONLIGHT_16B",
    "TINY",
    "CheckpointError",
    "LatentCache",
    "ModelConfig",
    "Transformer",
    "load",
    "save",
]
