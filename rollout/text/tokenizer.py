"""Tokenizer, prompts from templates, and the way back from tokens to the text that is graded.

The tokenizer is a byte-level BPE that never merges digits, operators or punctuation, so that
`3+4=7` is five tokens in every context; arithmetic is then learned symbol by symbol. Special
tokens and chat template have the names and the form of DeepSeek-R1's public checkpoint.

A template may prefill the completion (`<think>\\n`). The prefill is part of the *prompt's* tokens
and of the *completion's* text: `make_prompt` puts it in the one, `completion_text` in the other.

Data is text alone: what reads like a control token in a question, a message or a worked answer is encoded
character by character. Only templates write control tokens. The tags are tokens everywhere, special or not.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rollout.text.templates import TEMPLATES, THINK, template_named
from rollout.types import Problem, Prompt, Rollout

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
SPECIAL_TOKENS = (BOS, EOS, PAD, USER, ASSISTANT)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
"""Single tokens, but ordinary text: the format reward reads them, so decoding keeps them."""

Shots = Sequence[tuple[str, str]]
"""Questions with worked answers, before the one that is asked."""
GUARD = "\ufdd0"
"""Stands within the text of a control token that is data until it is encoded; no character, so in no text."""
PAST = "\ufdd1"
"""Stands for a past answer."""
_OPENED = re.compile(r"<think>\s*\Z")
_CLOSED = re.compile(r"<think>\s*</think>\s*\Z")

# Each alternative is one pre-token, and BPE never merges across two: a word with the space before it; a
# digit; a line break; other white space, less the space that a word takes; any other character by itself.
PIECES = r" ?[\p{L}\p{M}]+|\p{N}|[\r\n]|[^\S\r\n]+(?! ?[\p{L}\p{M}])|[^\S\r\n]|[^\s\p{L}\p{M}\p{N}]"

# As in DeepSeek-R1's tokenizer_config.json, without tool calls: past answers come without their thinking.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<｜Assistant｜>' + message['content'].split('</think>')[-1] + eos_token }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE; same texts in the same order, same tokenizer. `texts` is read once.
    `vocab_size` counts special tokens and tags too; a small corpus may fill fewer: size the embedding by
    `len(tokenizer)`. Raises `ValueError`: `vocab_size` below the 256 bytes and 9 added tokens."""
    least = 256 + len(SPECIAL_TOKENS) + len(TAGS)
    if vocab_size < least:
        raise ValueError(f"vocab_size={vocab_size} is below the {least} that bytes and added tokens take.")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(TAGS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
    )
    # The trainer does not know added tokens: left in, the tags would spend merges on `think` and `answer`.
    added = re.compile("|".join(map(re.escape, SPECIAL_TOKENS + TAGS)))
    core.train_from_iterator((piece for text in texts for piece in added.split(text) if piece), trainer)
    core.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,  # would eat the space in `a ,`
    )


def load_tokenizer(path: Path | str) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint directory. Raises `FileNotFoundError`: no such directory, or no tokenizer
    in it; `ValueError`: a tokenizer that cannot be read."""
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"no checkpoint directory {path}")
    if not has_tokenizer(path):
        raise FileNotFoundError(f"{path} has no tokenizer.json; copy the tokenizer of its base model there")
    try:
        return cast("PreTrainedTokenizerFast", AutoTokenizer.from_pretrained(path))
    except Exception as error:  # the libraries below raise many types, `Exception` itself among them
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        files = "tokenizer.json, tokenizer_config.json or config.json"
        raise ValueError(f"the tokenizer in {path} cannot be read ({files}): {why}") from error


def has_tokenizer(path: Path | str) -> bool:
    """Whether a checkpoint directory carries a tokenizer."""
    return any((Path(path) / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def render(tokenizer: PreTrainedTokenizerFast, question: str, template_name: str, shots: Shots = ()) -> str:
    """The prompt as text, a prefilled `<think>\\n` included. `shots` are earlier turns of a chat, so that the
    answers have the model's own markup and end, and come before the question in a text template.
    Raises `ValueError`: unknown template, or a chat template is needed and the tokenizer has none that
    works."""
    template = template_named(template_name)
    text = template.text.format(question=question)
    worked = [(template.text.format(question=asked), answer) for asked, answer in shots]
    if not template.chat:
        return "".join(f"{asked} {answer}\n\n" for asked, answer in worked) + text
    if not tokenizer.chat_template:
        raise ValueError(
            f"template {template_name!r} needs a chat template and this tokenizer has none; "
            f"use one of: {', '.join(t.name for t in TEMPLATES.values() if not t.chat)}"
        )
    turns = [text for pair in worked for text in pair] + [text]
    roles = itertools.cycle(("user", "assistant"))
    chat = chat_text(tokenizer, [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)])
    if template.think == "open" and not opening(chat):
        return _CLOSED.sub("", chat) + THINK
    return chat.removesuffix(opening(chat)) if template.think == "closed" else chat


def next_turn(tokenizer: PreTrainedTokenizerFast, text: str, template_name: str, ended: str) -> str:
    """What follows a turn that ended with the control token `ended`, up to the next one: `text` as the
    template's next question. Raises `ValueError`: as `render`, or its chat leaves past answers out."""
    _, past, rest = render(tokenizer, text, template_name, [("?", PAST)]).partition(PAST)
    if not past:
        raise ValueError("the chat template leaves past answers out, so that no turn can follow one")
    return rest.removeprefix(ended)


def chat_text(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]]) -> str:
    """A conversation in the tokenizer's chat template, generation prompt included.
    Raises `ValueError`: the template cannot be read, or refuses these messages."""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template is a program: it may raise anything
        raise ValueError(f"the tokenizer's chat template fails: {error}") from error


def opening(text: str) -> str:
    """The tag at a prompt's end that opens the thinking, with the white space after it; "" without one."""
    found = _OPENED.search(text)
    return found[0] if found else ""


def prefill(tokenizer: PreTrainedTokenizerFast, template_name: str) -> str:
    """What the template writes into the completion before the model does: `<think>\\n` or nothing."""
    chat = template_named(template_name).chat
    return opening(render(tokenizer, "", template_name)) if chat else ""


def control_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[int, str]:
    """The special tokens, without the tags."""
    added = tokenizer.added_tokens_decoder.items()
    return {i: token.content for i, token in added if token.special and token.content not in TAGS}


def as_data(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    """Text whose control tokens `encode_text` takes as characters.
    Raises `ValueError`: a lone surrogate, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a lone surrogate at character {error.start}, which is no text") from error
    for token in control_tokens(tokenizer).values():
        text = text.replace(token, token[0] + GUARD + token[1:])
    return text


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str, add_special_tokens: bool = False) -> list[int]:
    """Token ids of a text of templates and of data from `as_data`."""
    if GUARD not in text:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = tokenizer.encode("") if add_special_tokens else []
    for piece in re.split(f"({'|'.join(map(re.escape, sorted(special, key=len, reverse=True)))})", text):
        if piece in special:
            ids.append(special[piece])
        elif piece := piece.replace(GUARD, ""):
            ids += tokenizer.encode(piece, add_special_tokens=False, split_special_tokens=True)
    return ids


def decode(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    """The text of tokens without control tokens, tags included."""
    hidden = control_tokens(tokenizer)
    return str(tokenizer.decode([i for i in ids if i not in hidden], clean_up_tokenization_spaces=False))


def encode_prompt(
    tokenizer: PreTrainedTokenizerFast, question: str, template_name: str, shots: Shots = ()
) -> list[int]:
    """Token ids of the rendered prompt, with the tokenizer's own leading token exactly once."""
    data = [(as_data(tokenizer, asked), as_data(tokenizer, answer)) for asked, answer in shots]
    text = render(tokenizer, as_data(tokenizer, question), template_name, data)
    return encode_text(tokenizer, text, add_special_tokens=not TEMPLATES[template_name].chat)


def encode_raw(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Token ids of a prompt as its author wrote it, control tokens included; the leading token once."""
    as_data(tokenizer, text)
    written = bool(tokenizer.bos_token) and text.startswith(str(tokenizer.bos_token))
    return tokenizer.encode(text, add_special_tokens=not written)


def make_prompt(
    tokenizer: PreTrainedTokenizerFast, problem: Problem, template_name: str, shots: Shots = ()
) -> Prompt:
    """The problem as the model sees it."""
    token_ids = tuple(encode_prompt(tokenizer, problem.question, template_name, shots))
    return Prompt(problem=problem, template=template_name, token_ids=token_ids)


def completion_text(
    tokenizer: PreTrainedTokenizerFast, completion: Rollout | Sequence[int], template_name: str
) -> str:
    """The completion as text: the template's prefill, then the tokens without special ones. A stop token that
    is ordinary text, such as `</answer>`, is kept: graders need it. An endpoint's is as it came. Of several
    turns it is what the model wrote, no observations, from the beginning of its last message on."""
    if isinstance(completion, Rollout) and completion.text is not None:
        return completion.text
    ids, turns = list[int](), completion.turns if isinstance(completion, Rollout) else [(True, completion)]
    ends = {*control_tokens(tokenizer), tokenizer.eos_token_id} if len(turns) > 1 else set()
    for own, part in turns:
        if own:
            ids = [*(() if ends.intersection(ids[-1:]) else ids), *part]
    if ids and ids[-1] == tokenizer.eos_token_id:  # not every tokenizer marks its eos as special
        ids.pop()
    return prefill(tokenizer, template_name) + decode(tokenizer, ids)


def turn_texts(tokenizer: PreTrainedTokenizerFast, rollout: Rollout) -> list[list[str]]:
    """A completion of several turns in order, special tokens included: ["model" or "environment", text]."""
    return [[("environment", "model")[own], str(tokenizer.decode(list(ids)))] for own, ids in rollout.turns]


def encode_example(
    tokenizer: PreTrainedTokenizerFast, question: str, template_name: str, completion: str
) -> tuple[list[int], list[int]]:
    """A worked example as the engine would have seen it: prompt ids, completion ids with eos.
    Raises `ValueError`: the completion lacks the template's prefill, or the tokenizer has no eos."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos token, so an example would have no end; set eos_token.")
    opened, text = prefill(tokenizer, template_name), completion.removesuffix(str(tokenizer.eos_token))
    if opened and text.startswith(TAGS[0]) and not text.startswith(opened):
        text = opened + text.removeprefix(TAGS[0]).lstrip()  # the template has another spacing
    if not text.startswith(opened):
        raise ValueError(
            f"template {template_name!r} prefills {opened!r}, and the completion starts with "
            f"{completion[:20]!r}; pass the completion with its prefill."
        )
    ids = encode_text(tokenizer, as_data(tokenizer, text[len(opened) :]))
    return encode_prompt(tokenizer, question, template_name), [*ids, tokenizer.eos_token_id]


def template_hash(tokenizer: PreTrainedTokenizerFast, template_name: str, shots: Shots = ()) -> str:
    """sha256 of what the template makes of a fixed question, so that a changed prompt shows in the record."""
    ids = encode_prompt(tokenizer, "probe 1+1=?\nprobe", template_name, shots)
    done = [tokenizer.decode(ids), prefill(tokenizer, template_name)]
    return hashlib.sha256(json.dumps(done, ensure_ascii=False).encode()).hexdigest()
