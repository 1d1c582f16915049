"""Wrong inputs, made from right ones: damaged models, problem files, corpora and run directories.

A maker gets the folder or file to damage. The tables say, for each, what the message must name.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Maker = Callable[[Path], None]


def edited(name: str, **changes: Any) -> Maker:
    """Change keys of a JSON file; `...` removes one."""

    def edit(folder: Path) -> None:
        table = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({k: v for k, v in table.items() if v is not ...}))

    return edit


def replaced(name: str, data: bytes | str) -> Maker:
    """Another content for a file."""

    def replace(folder: Path) -> None:
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)

    return replace


def removed(name: str) -> Maker:
    """No such file."""
    return lambda folder: (folder / name).unlink()


def a_folder(name: str) -> Maker:
    """A folder where a file belongs."""

    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return make


def cut(name: str, keep: float) -> Maker:
    """The first part of a file."""

    def truncate(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(keep * len(data))])

    return truncate


def tensors(change: Callable[[dict[str, Any]], None]) -> Maker:
    """Other tensors in model.safetensors."""

    def edit(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        table = load_file(folder / "model.safetensors")
        change(table)
        save_file(table, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def _norm(table: dict[str, Any]) -> str:
    return "model.norm.weight"


def _drop(table: dict[str, Any]) -> None:
    del table[_norm(table)]


def _extra(table: dict[str, Any]) -> None:
    table["model.unheard.weight"] = table[_norm(table)].clone()


def _reshape(table: dict[str, Any]) -> None:
    table[_norm(table)] = table[_norm(table)][:-1].clone()


def _infinite(table: dict[str, Any]) -> None:
    table[_norm(table)][0] = float("inf")


def _integers(table: dict[str, Any]) -> None:
    import torch

    name = "model.layers.1.self_attn.o_proj.weight"
    table[name] = table[name].to(torch.int8)


def _fp8(table: dict[str, Any]) -> None:
    import torch

    name = "model.layers.1.self_attn.o_proj.weight"
    table[name] = table[name].to(torch.float8_e4m3fn)


SHARDS = '{"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}, "metadata": {}}'

MODELS: dict[str, Maker] = {
    "no config": removed("config.json"),
    "empty config": replaced("config.json", ""),
    "garbage config": replaced("config.json", b"\xff\xfe\x00{"),
    "cut config": cut("config.json", 0.5),
    "config is a list": replaced("config.json", "[1, 2]"),
    "config is null": replaced("config.json", "null"),
    "config is a folder": a_folder("config.json"),
    "no model type": edited("config.json", model_type=...),
    "unknown model type": edited("config.json", model_type="frobnicate"),
    "model type is a number": edited("config.json", model_type=3),
    "no heads": edited("config.json", num_attention_heads=0),
    "heads are text": edited("config.json", num_attention_heads="four"),
    "layers below 0": edited("config.json", num_hidden_layers=-1),
    "more layers": edited("config.json", num_hidden_layers=9),
    "fewer layers": edited("config.json", num_hidden_layers=1),
    "width is text": edited("config.json", hidden_size="wide"),
    "width is null": edited("config.json", hidden_size=None),
    "other width": edited("config.json", hidden_size=48),
    "other vocabulary": edited("config.json", vocab_size=7),
    "vocabulary of 0": edited("config.json", vocab_size=0),
    "unknown activation": edited("config.json", hidden_act="wow"),
    "unknown rope": edited("config.json", rope_scaling={"rope_type": "spiral", "factor": 2.0}),
    "rope is text": edited("config.json", rope_scaling="yes"),
    "no weights": removed("model.safetensors"),
    "empty weights": replaced("model.safetensors", b""),
    "garbage weights": replaced("model.safetensors", b"not tensors at all" * 9),
    "huge header": replaced("model.safetensors", struct.pack("<Q", 1 << 60) + b"{}"),
    "cut weights": cut("model.safetensors", 0.7),
    "weights are a folder": a_folder("model.safetensors"),
    "missing shard": lambda d: (
        removed("model.safetensors")(d),
        replaced("model.safetensors.index.json", SHARDS)(d),
    )[0],
    "garbage index": lambda d: (
        removed("model.safetensors")(d),
        replaced("model.safetensors.index.json", "{")(d),
    )[0],
    "tensor missing": tensors(_drop),
    "tensor unknown": tensors(_extra),
    "tensor of another shape": tensors(_reshape),
    "tensor of integers": tensors(_integers),
    "tensor with an infinity": tensors(_infinite),
    "fp8 without its scale": tensors(_fp8),
}
"""Damage that no command may accept."""

FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors",
)
CONTENTS = (b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b"[1, 2]")
"""What no file of a model may hold; `[]` is as good as no generation config."""

CONFIGS = [
    *[{"vocab_size": v} for v in (0, -1, "x", None, 1e9, 3, [1])],
    *[{"hidden_size": v} for v in ("x", 0, 33, None)],
    *[{"num_attention_heads": v} for v in (0, "4", 7)],
    *[{"rope_scaling": v} for v in ("x", {"type": "linear", "factor": 2}, {"type": "yarn"})],
    *[{"max_position_embeddings": v} for v in (0, -5, "96", None)],
    *[{"model_type": v} for v in (None, "nope")],
    *[{"eos_token_id": v} for v in ("</s>", [[]])],
    *[{"num_hidden_layers": v} for v in (0, 99, "2", None)],
    *[{"n_routed_experts": v} for v in (0, 7, "8")],
    *[
        {key: "x"}
        for key in ("rms_norm_eps", "rope_theta", "q_lora_rank", "tie_word_embeddings", "unknown_key")
    ],
]
"""Changes of a native model's config that make it another's."""

CHAT_TEMPLATES = ("{{ 1/0 }}", "{% for %}", "{{ messages[0].x.y }}", "{{ raise_exception('no') }}")
"""Programs that fail."""

TOKENIZERS: dict[str, Maker] = {
    "garbage tokenizer": replaced("tokenizer.json", "{]"),
    "tokenizer of nothing": replaced("tokenizer.json", "{}"),
    "tokenizer is a folder": a_folder("tokenizer.json"),
    "cut tokenizer": cut("tokenizer.json", 0.5),
    "no tokenizer": removed("tokenizer.json"),
    "garbage tokenizer config": replaced("tokenizer_config.json", "]"),
    "tokenizer config is a list": replaced("tokenizer_config.json", "[]"),
}
"""Damage that a command with text may not accept."""

HARMLESS: dict[str, Maker] = {
    "garbage generation config": replaced("generation_config.json", "{"),
    "EOS is text": edited("generation_config.json", eos_token_id="end"),
    "EOS beyond the vocabulary": edited("generation_config.json", eos_token_id=[99_999_999]),
    "garbage pipeline.json": replaced("pipeline.json", "{"),
    "pipeline.json is a list": replaced("pipeline.json", "[]"),
    "unknown template": replaced("pipeline.json", '{"template": "r9"}'),
    "template is a number": replaced("pipeline.json", '{"template": 9}'),
    "tokens are text": replaced("pipeline.json", '{"template": "r1", "tokens": {"trained": "many"}}'),
    "broken chat template": replaced("chat_template.jinja", "{% for x in %}"),
    "control key of another library": edited("config.json", _attn_implementation_autoset=True),
}
"""What one command needs and another does not: each either refuses it by name or does not read it."""

DEEP = "[" * 100_000
QUESTION = '"question": "1+1=?"'

TRACE = {"id": "a", "question": "q", "completion": "<think>\na\n</think>\n<answer>1</answer>"}


def as_bytes(row: Any) -> bytes:
    """A file's content: bytes, text, or an object for one line of JSON."""
    text = row if isinstance(row, bytes | str) else json.dumps(row) + "\n"
    return text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")


PROBLEMS: dict[str, bytes] = {
    name: as_bytes(row)
    for name, row in {
        "empty": "",
        "blank lines": "\n\n  \n",
        "garbage": b"\x80\x81\xfe\xff" * 20,
        "prose": "This is no data.\nAt all.\n",
        "a number a line": "1\n2\n3\n",
        "a list a line": '["1+1", "2"]\n',
        "a cut line": '{"question": "1+1=?", "answer": "2"',
        "UTF-16": ('{"question": "1+1=?", "answer": "2"}\n' * 3).encode("utf-16"),
        "nested too deep": '{"question": ' + DEEP + "\n",
        "no question": '{"answer": "2"}\n',
        "question is a number": '{"question": 5, "answer": "2"}\n',
        "question is null": '{"question": null, "answer": "2"}\n',
        "question is empty": '{"question": "", "answer": "2"}\n',
        "question is blank": '{"question": "  ", "answer": "2"}\n',
        "turns without text": '{"prompt": [{"role": "user"}], "answer": "2"}\n',
        "turns are empty": '{"prompt": [], "answer": "2"}\n',
        "no answer": f"{{{QUESTION}}}\n",
        "answer is null": f'{{{QUESTION}, "answer": null}}\n',
        "answer is empty": f'{{{QUESTION}, "answer": ""}}\n',
        "answer is an object": f'{{{QUESTION}, "answer": {{"value": 2}}}}\n',
        "answer is a truth value": f'{{{QUESTION}, "answer": true}}\n',
        "answer is NaN": f'{{{QUESTION}, "answer": NaN}}\n',
        "answer is a proof": f'{{{QUESTION}, "answer": "proof"}}\n',
        "answer was not found": f'{{{QUESTION}, "answer": "notfound"}}\n',
        "tests are a number": f'{{{QUESTION}, "tests": 3}}\n',
        "tests are numbers": f'{{{QUESTION}, "tests": [1, 2]}}\n',
        "tests are empty": f'{{{QUESTION}, "kind": "code", "tests": []}}\n',
        "tests without output": f'{{{QUESTION}, "tests": [{{"input": "1"}}]}}\n',
        "unknown kind": f'{{{QUESTION}, "answer": "2", "kind": "poetry"}}\n',
        "too long a question": f'{{"question": "{"1+" * 5_000}1=?", "answer": "5001"}}\n',
        "only a mark": "\ufeff",
        "only brackets": DEEP,
        "text": '"a"',
        "null": "null",
        "an empty array": "[]",
        "arrays": "[[[]]]",
        "no keys": {},
        "answer has too many digits": f'{{{QUESTION}, "answer": {"9" * 5_000}}}',
        "answer is too long": {"question": "1?", "answer": "9" * 5_000},
        "question is a surrogate": '{"question": "a\\ud800", "answer": "1"}',
        "answer is a surrogate": '{"question": "a", "answer": "\\ud800"}',
        "question is a list": {"question": [], "answer": "1"},
        "turns are numbers": {"messages": [1, 2], "answer": "1"},
        "two questions": {"messages": [{"role": "user", "content": "a"}] * 2, "answer": "1"},
        "tests are no Python": {"question": "q", "tests": ["assert ("]},
        "more inputs than outputs": {"question": "q", "tests": {"inputs": [1], "outputs": []}},
        "cases are no JSON": {"question": "q", "input_output": "{bad"},
        "test_list is text": {"text": "q", "test_list": "assert"},
        "test_list has null": {"text": "q", "test_list": [None], "test_imports": [3]},
        "packed tests": {"question_content": "q", "public_test_cases": "x", "private_test_cases": "AAAA"},
        "public tests are a number": {"description": "q", "public_tests": 5},
        "starter code is a number": {"question": "q", "starter_code": 5, "test": "x"},
        "test_info is a number": {"question": "q", "test": "x", "test_info": 5},
        "prompt is a number": {"prompt": 5, "entry_point": "f", "test": "x"},
        "reward model is text": {"prompt": "q", "reward_model": "x"},
        "ground truth is null": {"prompt": "q", "reward_model": {"ground_truth": None}},
        "language is a number": {"question": "q", "answer": "1", "language": 5},
        "kind is a list": {"question": "q", "answer": "1", "kind": ["x"]},
        "generations are a number": {"problem": "q", "generations": 5},
        "checks are a number": {"problem": "q", "generations": ["a"], "correctness_math_verify": 5},
        "trace without its answer": TRACE | {"answer": None},
        "trace is null": TRACE | {"completion": None},
        "trace is a list": TRACE | {"completion": []},
    }.items()
}
"""Files without one row that is a usable problem, worked answer or, but for `ARE_PROMPTS`, prompt."""
ARE_PROMPTS = ("reward model is text", "ground truth is null")

CORPORA: dict[str, bytes] = {
    name: as_bytes(text)
    for name, text in {
        "empty": "",
        "garbage": b"\x80\x81\xfe\xff" * 20,
        "a list a line": '["a", "b"]\n',
        "no question": '{"id": "a", "completion": "2"}\n',
        "no completion": '{"id": "a", "question": "1+1"}\n',
        "completion is null": '{"id": "a", "question": "1+1", "completion": null}\n',
        "completion is empty": '{"id": "a", "question": "1+1", "completion": ""}\n',
        "question is a number": '{"id": "a", "question": 3, "completion": "2"}\n',
        "question is an object": '{"id": "a", "question": {"a": 1}, "completion": "2"}\n',
        "too long": f'{{"id": "a", "question": "1+1", "completion": "{"2 " * 5_000}"}}\n',
        "cut": '{"id": "a", "question": "1+1", "completion": "2"',
        "nested too deep": '{"question": ' + DEEP + "\n",
        "role is null": {"messages": [{"role": None, "content": "a"}, {"role": "assistant", "content": "b"}]},
        "role is wrong": {"messages": [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]},
        "role is a list": {"messages": [{"role": ["user"], "content": "a"}]},
        "turn is null": {"messages": [{"role": "user", "content": "a"}, None]},
        "answer before the question": {
            "conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}]
        },
    }.items()
}
"""Files without one usable worked answer."""

PROMPTS: dict[str, bytes] = {
    name: as_bytes(text)
    for name, text in {
        "empty": "",
        "garbage": b"\x80\x81\xfe\xff" * 20,
        "a list a line": "[1, 2]\n",
        "neither text nor ids": '{"question": "1+1"}\n',
        "text is a number": '{"prompt": 3}\n',
        "ids are text": '{"token_ids": "5 6"}\n',
        "ids are fractions": '{"token_ids": [1.5]}\n',
        "ids are truth values": '{"token_ids": [true]}\n',
        "ids below 0": '{"token_ids": [-1]}\n',
        "ids beyond the vocabulary": '{"token_ids": [99999]}\n',
        "ids beyond 64 bits": '{"token_ids": [99999999999999999999999]}\n',
        "no ids": '{"token_ids": []}\n',
        "too many ids": json.dumps({"token_ids": [5] * 500}) + "\n",
        "too long a text": json.dumps({"prompt": "1+" * 5_000}) + "\n",
        "cut": '{"prompt": "1+1',
    }.items()
}
"""Files that `generate` cannot answer."""

ENVIRONMENTS: dict[str, tuple[str, str]] = {
    "cannot be imported": ("import nothing_of_that_name\ndef play(problem): ...", "nothing_of_that_name"),
    "has no such function": ("def plays(problem): ...", "plays"),
    "takes no problem": ("def play(): return lambda messages: None", "TypeError"),
    "gives no step": ("def play(problem): return 3", "TypeError"),
    "raises": ("def play(problem): return lambda messages: {}['board']", "KeyError: 'board'"),
    "exits": ("def play(problem): return lambda messages: exit(3)", "it called exit()"),
    "hangs": ("import time\ndef play(problem): return lambda messages: time.sleep(20)", "no answer within"),
    "answers with a list": ("def play(problem): return lambda messages: ['a']", "TypeError"),
    "answers with half a character": ("def play(problem): return lambda messages: '\\ud800'", "surrogate"),
    "scores with no number": ("def play(problem): return lambda messages: float('inf')", "inf"),
    "answers with megabytes": ("def play(problem): return lambda messages: 'x' * 5_000_000", ""),
    "prints megabytes": ("def play(problem): return lambda messages: print('x' * 5_000_000)", ""),
}
"""Modules of users whose function `play` is an environment, and what is named; empty = rollouts go on."""

RUNS: dict[str, tuple[Maker, str]] = {
    "config is garbage": (replaced("config.toml", "steps == 1"), "config.toml"),
    "config is empty": (replaced("config.toml", ""), "runs/tiny/zero was begun with"),
    "config is not text": (replaced("config.toml", b"\xff\xfe\x00"), "config.toml"),
    "config is a folder": (a_folder("config.toml"), "config.toml"),
    "environment is garbage": (replaced("env.json", "{"), "env.json"),
    "environment is a list": (replaced("env.json", "[]"), "env.json"),
    "no environment": (removed("env.json"), "env.json"),
    "environment without inputs": (edited("env.json", inputs=...), "env.json"),
    "latest is garbage": (replaced("latest", b"\xff\xfe"), "latest"),
    "latest is empty": (replaced("latest", ""), "latest"),
    "latest names nothing": (replaced("latest", "checkpoint-77\n"), "checkpoint-77"),
    "latest leads outside": (replaced("latest", "../../..\n"), "latest"),
    "manifest is garbage": (replaced("checkpoint-1/manifest.json", "{"), "checkpoint-1"),
    "manifest is a list": (replaced("checkpoint-1/manifest.json", "[]"), "checkpoint-1"),
    "manifest of nothing": (replaced("checkpoint-1/manifest.json", "{}"), "checkpoint-1"),
    "no manifest": (removed("checkpoint-1/manifest.json"), "checkpoint-1"),
    "state is cut": (cut("checkpoint-1/state.pt", 0.5), "checkpoint-1"),
    "no state": (removed("checkpoint-1/state.pt"), "checkpoint-1"),
    "lock is a folder": (a_folder("lock"), "lock"),
    "metrics are a folder": (a_folder("metrics.jsonl"), "metrics.jsonl"),
    "samples are a folder": (a_folder("samples.jsonl"), "samples.jsonl"),
}
"""Damage of a run directory that a resumed stage may not accept, and the file that the message names."""
