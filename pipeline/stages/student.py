"""Stage `student`: a small dense Llama, pretrained on the base's documents, for `distill` to teach."""

from transformers import LlamaConfig, LlamaForCausalLM

from model.dense import DensePolicy
from pipeline.run.directory import RunDir
from pipeline.settings.supervised import StudentSettings
from pipeline.stages.pretrain import pretrain, shape_of
from pipeline.train.place import device_named
from pipeline.train.policy import loading
from rollout.text.tokenizer import load_tokenizer


def run(config: StudentSettings, run_dir: RunDir) -> None:
    """Train from fresh weights; leave `model/`."""
    device_named(config.device)  # refuse it before a model is opened
    speaker = run_dir.model_input(config.tokenizer_from)
    with loading(speaker):
        tokenizer = load_tokenizer(speaker)
    own = shape_of(config, tokenizer, LlamaConfig) | {"tie_word_embeddings": True}
    shape = LlamaConfig(**own, max_position_embeddings=max(2048, config.max_length))
    pretrain(config, run_dir, tokenizer, shape, lambda: DensePolicy(LlamaForCausalLM(shape)))
