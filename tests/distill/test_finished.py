"""The finished student: a checkpoint that transformers' pipeline talks to, whatever its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, pipeline

from distill.student import as_taught, rate_for, speaking
from rollout.text.templates import THINK
from rollout.text.tokenizer import encode_prompt, render
from tests.distill.conftest import small_llama, toy_rows

Distill = Callable[..., Path]
IM = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + "
    "'<|im_end|>' + '\\n' }}{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}\n"
)
"""SmolLM2's and Qwen's form."""


@pytest.fixture(scope="module")
def theirs(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of another maker: byte-level BPE as SmolLM2's, pad == eos, `<think>` a special token."""
    folder = tmp_path_factory.mktemp("theirs")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=special
    )
    core.train_from_iterator((toy / "corpus.jsonl").read_text().splitlines(), trainer)
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "bos_token": "<|im_start|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, chat_template=IM, **ends)
    tokenizer.save_pretrained(folder)
    small_llama(tokenizer, 64, 128).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bare(theirs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without a chat template."""
    folder = tmp_path_factory.mktemp("bare")
    tokenizer = AutoTokenizer.from_pretrained(theirs)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    small_llama(tokenizer, 64, 128).save_pretrained(folder)
    return folder


def talk(folder: Path, question: str) -> str:
    """What transformers' own pipeline answers to a chat message."""
    torch.manual_seed(0)
    chat = pipeline("text-generation", model=str(folder), device="cpu")
    message = [{"role": "user", "content": question}]
    return str(chat(message, max_new_tokens=80, do_sample=False)[0]["generated_text"][-1]["content"])


@pytest.mark.parametrize("start", ["theirs", "bare"])
def test_the_pipeline_of_transformers_gets_a_think_block(
    start: str,
    distill: Distill,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    init = request.getfixturevalue(start)
    trace = {"completion": "<think>\nI add.\n</think>\n<answer>some</answer>"}
    file = tmp_path / "easy.jsonl"
    file.write_text("".join(json.dumps(row | trace) + "\n" for row in toy_rows(60)))
    folder = distill(init_from=str(init), corpus=(str(file),), steps=50, log_every=25)
    said = capsys.readouterr().out
    assert ("the student gets that of R1 in plain words" in said) == (start == "bare")
    assert "tokens: mean" in said and "longest" in said

    student, plain = folder / "student/model", folder / "plain/model"
    assert talk(student, "1+2+3") == "I add.\n</think>\n<answer>some</answer>"  # after the prompt's <think>
    assert talk(plain, "1+2+3") == "<answer>some</answer>"
    tokenizer = AutoTokenizer.from_pretrained(student)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "1+2"}], add_generation_prompt=True)
    assert list(prompt["input_ids"]) == encode_prompt(speaking(init), "1+2", "r1")
    assert tokenizer.decode(prompt["input_ids"]).endswith(THINK)
    if start == "bare":
        assert "User: 1+2\n\nAssistant: <think>\n" in tokenizer.decode(prompt["input_ids"])
    made = json.loads((student / "generation_config.json").read_text())
    assert (made["do_sample"], made["temperature"], made["top_p"]) == (True, 0.6, 0.95)
    assert made["eos_token_id"] == [tokenizer.eos_token_id]
    assert "temperature 0.6" in (student / "README.md").read_text()


CHATS = {
    "none": IM,
    "open": IM.replace("assistant\\n' }}{% endif", "assistant\\n<think>\\n' }}{% endif"),
    "closed": IM.replace("assistant\\n' }}{% endif", "assistant\\n<think>\\n\\n</think>\\n\\n' }}{% endif"),
}


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", ["r1", "plain", "boxed", "r1-zero"])
def test_a_chat_starts_what_was_taught(name: str, chat: str, theirs: Path) -> None:
    """And a conversation without a generation prompt reads as before."""
    tokenizer = AutoTokenizer.from_pretrained(theirs)
    tokenizer.chat_template = CHATS[chat]
    taught, turns = render(tokenizer, "2+2?", name), [{"role": "user", "content": "2+2?"}]
    before = tokenizer.apply_chat_template(turns, tokenize=False)
    tokenizer.chat_template = as_taught(tokenizer, name)
    assert tokenizer.apply_chat_template(turns, tokenize=False) == before
    if name in ("r1", "plain"):
        assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == taught
    assert render(tokenizer, "2+2?", name) == taught


@pytest.mark.parametrize(
    ("kind", "size", "rate"),
    [
        ("qwen2", 1.54e9, 1e-4),
        ("qwen2", 7.62e9, 8e-5),
        ("qwen2", 14.8e9, 7e-5),
        ("qwen2", 32.8e9, 6e-5),
        ("llama", 8.03e9, 5e-5),
        ("llama", 70.6e9, 2e-5),
        ("llama", 0.7e6, 6e-4),
    ],
)
def test_the_rate_follows_the_size(
    kind: str, size: float, rate: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report's six students (arXiv:2501.12948, supplementary), and a tiny one."""
    model = SimpleNamespace(num_parameters=lambda: size, config=SimpleNamespace(model_type=kind))
    assert rate_for(model) == pytest.approx(rate, rel=0.01)
    assert "M parameters" in capsys.readouterr().out
    model = SimpleNamespace(num_parameters=lambda: 135e6, config=SimpleNamespace(model_type=kind))
    assert 1e-4 < rate_for(model) < 3e-4
