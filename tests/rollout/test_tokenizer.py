import random
import sys

import pytest
from transformers import AutoTokenizer

from rollout.text.tokenizer import (
    ASSISTANT,
    BOS,
    EOS,
    PAD,
    SPECIAL_TOKENS,
    TAGS,
    USER,
    load_tokenizer,
    train_tokenizer,
)


def pieces(tokenizer, text):
    return [tokenizer.decode([i]) for i in tokenizer.encode(text)]


@pytest.mark.parametrize("text", ["3+4=7", "12345", "(1*2)/3-4", "a,b.c:d?", "10+20=30\n", "f(12)=3.14"])
def test_digits_and_operators_are_single_tokens(tokenizer, text):
    assert pieces(tokenizer, text) == list(text)


def test_no_token_joins_a_digit_or_operator_with_anything(tokenizer):
    ours = set("0123456789+-*/=().,:?\n，。：？")
    learned = set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder)
    for text in map(tokenizer.decode, learned):
        assert len(text) == 1 or not ours & set(text), f"token {text!r} joins"


def test_chinese_punctuation_stands_alone_and_words_take_their_space(tokenizer):
    assert "，" in pieces(tokenizer, "你好，世界。")
    assert " world" in pieces(tokenizer, "Hello world")


def strings():
    random_source = random.Random(0)
    code_points = [c for c in range(sys.maxunicode + 1) if not 0xD800 <= c <= 0xDFFF]  # no lone surrogates
    yield from (
        "",
        " ",
        "  a  , b\t\n\r\n ",
        "👩‍👩‍👧 é e\u0301 \u00a0\u3000",
        "<think></think>",
        "".join(SPECIAL_TOKENS + TAGS),
    )
    for low, high in ((0, 0x80), (0, 0x3000), (0x4E00, 0x9FFF), (0, len(code_points))):
        for _ in range(20):
            yield "".join(map(chr, random_source.choices(code_points[low:high], k=40)))


def test_round_trip_is_exact(tokenizer):
    for text in strings():
        assert tokenizer.decode(tokenizer.encode(text)) == text, repr(text)


def test_tags_are_single_and_kept_and_special_tokens_are_single_and_dropped(tokenizer):
    for token in SPECIAL_TOKENS + TAGS:
        assert len(tokenizer.encode(token)) == 1
    text = "<think>\n1</think><answer> 2 </answer>"
    assert tokenizer.decode(tokenizer.encode(BOS + text + EOS), skip_special_tokens=True) == text
    assert set(tokenizer.all_special_tokens) == set(SPECIAL_TOKENS)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (BOS, EOS, PAD)


def test_merges_are_not_spent_on_tags():
    learned = train_tokenizer(["<think>x</think><answer>x</answer>"] * 100, vocab_size=300).get_vocab()
    assert "think" not in learned and "<think>" in learned


def test_same_corpus_same_tokenizer(tokenizer):
    corpus = [f"{a} words and {b} more of them: {a + b}" for a in range(30) for b in range(30)]
    first, second = (train_tokenizer(corpus, 350).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


def test_vocab_size_is_kept_and_its_lower_bound_named():
    corpus = [f"word{chr(97 + i)}{chr(97 + j)} " * 3 for i in range(26) for j in range(26)]
    assert len(train_tokenizer(corpus, 300)) == 300
    with pytest.raises(ValueError, match="265"):
        train_tokenizer(corpus, 264)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "llama"])
def test_saved_tokenizer_loads_anywhere(tokenizer, tmp_path, model_type):
    """Transformers picks tokenizer classes by the model's type too; neither may replace ours."""
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)):
        for text in strings():
            assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.chat_template == tokenizer.chat_template
        assert loaded.all_special_ids == tokenizer.all_special_ids
        assert loaded.decode(loaded.encode("<think>a , b")) == "<think>a , b"


def test_chat_template_is_r1s(tokenizer):
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nlong\n</think>\n\nb"},
        {"role": "user", "content": "c"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == f"{BOS}{USER}a{ASSISTANT}\n\nb{EOS}{USER}c{ASSISTANT}<think>\n"
    assert tokenizer.apply_chat_template(messages[:1], tokenize=False) == f"{BOS}{USER}a"


def test_missing_tokenizer_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint directory"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        load_tokenizer(tmp_path)
