"""Stage `student`: a small dense Llama, pretrained on the base's documents, for `distill` to teach."""

from transformers import LlamaConfig, LlamaForCausalLM

from model.dense import DensePolicy
from pipeline.run.directory import RunDir
from pipeline.settings.supervised import StudentSettings
from pipeline.stages.pretrain import pretrain
from pipeline.train.policy import loading
from rollout.text.tokenizer import load_tokenizer


def run(config: StudentSettings, run_dir: RunDir) -> None:
    """Train from fresh weights; leave `model/`."""
    speaker = run_dir.model_input(config.tokenizer_from)
    with loading(speaker):
        tokenizer = load_tokenizer(speaker)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        initializer_range=config.initializer_range,
        max_position_embeddings=max(2048, config.max_length),
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )

    def fresh() -> DensePolicy:
        return DensePolicy(LlamaForCausalLM(shape))

    pretrain(config, run_dir, tokenizer, shape, fresh, "Small dense base")
