"""Whatever a user types, names or supplies: one line that says what was found, exit code 2, no traceback.

Rows that cannot be used end no command that has others; here each file has no row but the wrong one, so
training and evaluation refuse it, while `grade` answers every line.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipeline.__main__ import main
from tests.conftest import ROOT
from tests.small import random_policy

TRACE = {"id": "a", "question": "q", "completion": "<think>\na\n</think>\n<answer>1</answer>"}
ROWS = {
    "empty": "",
    "mark": "\ufeff",
    "blank": "\n \n",
    "bytes": b"\x00\xff" * 50,
    "utf16": '{"a": 1}'.encode("utf-16"),
    "deep": "[" * 100_000,
    "deep_value": '{"question": ' + "[" * 100_000,
    "text": '"a"',
    "number": "5",
    "null": "null",
    "array": "[]",
    "arrays": "[[[]]]",
    "no_keys": "{}",
    "cut": '{"question": "1+1?", "answer": "2',
    "nan": '{"question": "1?", "answer": NaN}',
    "digits": '{"question": "1?", "answer": ' + "9" * 5_000 + "}",
    "long_answer": {"question": "1?", "answer": "9" * 5_000},
    "surrogate": '{"question": "a\\ud800", "answer": "1"}',
    "surrogate_answer": '{"question": "a", "answer": "\\ud800"}',
    "bool": {"question": "q", "answer": True},
    "dict": {"question": "q", "answer": {"a": 1}},
    "proof": {"question": "q", "answer": "proof"},
    "no_question": {"question": "", "answer": "1"},
    "list_question": {"question": [], "answer": "1"},
    "turns": {"messages": [1, 2], "answer": "1"},
    "no_text": {"messages": [{"role": "user"}], "answer": "1"},
    "two_questions": {"messages": [{"role": "user", "content": "a"}] * 2, "answer": "1"},
    "number_test": {"question": "q", "tests": [1]},
    "no_python": {"question": "q", "tests": ["assert ("]},
    "uneven": {"question": "q", "tests": {"inputs": [1], "outputs": []}},
    "bad_cases": {"question": "q", "input_output": "{bad"},
    "no_list": {"text": "q", "test_list": "assert"},
    "list_of_none": {"text": "q", "test_list": [None], "test_imports": [3]},
    "packed": {"question_content": "q", "public_test_cases": "x", "private_test_cases": "AAAA"},
    "column": {"description": "q", "public_tests": 5},
    "starter": {"question": "q", "starter_code": 5, "test": "x"},
    "info": {"question": "q", "test": "x", "test_info": 5},
    "prompt": {"prompt": 5, "entry_point": "f", "test": "x"},
    "model": {"prompt": "q", "reward_model": "x"},
    "no_truth": {"prompt": "q", "reward_model": {"ground_truth": None}},
    "language": {"question": "q", "answer": "1", "language": 5},
    "kind": {"question": "q", "answer": "1", "kind": ["x"]},
    "generations": {"problem": "q", "generations": 5},
    "null_answer": TRACE | {"answer": None},
    "checks": {"problem": "q", "generations": ["a"], "correctness_math_verify": 5},
    "null_completion": TRACE | {"completion": None},
    "list_completion": TRACE | {"completion": []},
}
FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors",
)
CONFIGS = [
    *[{"vocab_size": v} for v in (0, -1, "x", None, 1e9, 3, [1])],
    *[{"hidden_size": v} for v in ("x", 0, 33, None)],
    *[{"num_attention_heads": v} for v in (0, "4", 7)],
    *[{"rope_scaling": v} for v in ("x", {"type": "linear", "factor": 2}, {"type": "yarn"})],
    *[{"max_position_embeddings": v} for v in (0, -5, "96", None)],
    *[{"model_type": v} for v in (None, "nope")],
    *[{"eos_token_id": v} for v in ("</s>", -1, [[]])],
    *[{"num_hidden_layers": v} for v in (0, 99, "2", None)],
    *[{"n_routed_experts": v} for v in (0, 7, "8")],
    *[
        {key: "x"}
        for key in ("rms_norm_eps", "rope_theta", "q_lora_rank", "tie_word_embeddings", "unknown_key")
    ],
]
TOMLS = (
    b"\xff",
    b"a = ",
    b"steps = 'x'",
    b"steps = 99999999999999999999999",
    b"steps=1\nsteps=2",
    b"[steps]\na=1",
    b"optim = 3",
    b"name = ['a']",
    b"\x00",
    b'runs = "a\\u0000b"',
    b"fields = 'x=y'",
    b"max_bad_rows = nan",
    b"max_bad_rows = -1",
    b"hold_back = 2",
    b"problems = []",
    b"threads = 99999999999999999999",
)


@pytest.fixture(scope="module")
def good(tokenizer, tmp_path_factory):
    """A model of 96 positions."""
    folder = tmp_path_factory.mktemp("good") / "model"
    return random_policy(folder, tokenizer, "r1", max_position_embeddings=96)


@pytest.fixture
def refused(capsys, tmp_path):
    """`refused(*words)`: the error of a command line that must end with exit code 2 and one line."""

    def go(*words: object) -> str:
        code = main([str(word) for word in words])
        said = capsys.readouterr()
        lines = [line for line in said.err.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(lines) == 1 and said.err.rstrip().endswith(lines[0]), (words, code, said)
        return lines[0]

    return go


def zero(good: Path, tmp_path: Path, *more: object) -> list[object]:
    """A short RL run."""
    flags = ["--steps", 1, "--prompts-per-step", 2, "--max-tokens", 8, "--eval-every", 0, "--threads", 1]
    config = ["--config", ROOT / "configs/micro/zero.toml", "--init-from", good]
    return ["zero", *config, "--runs", tmp_path / "runs", *flags, *more]


def sft(good: Path, tmp_path: Path, corpus: Path) -> list[object]:
    """SFT on a corpus alone."""
    flags = ["--curated", 0, "--samples-from=", "--corpus", corpus, "--epochs", 1, "--threads", 1]
    return [
        "sft",
        "--config",
        ROOT / "configs/micro/sft.toml",
        "--init-from",
        good,
        "--runs",
        tmp_path / "r",
        *flags,
    ]


@pytest.mark.parametrize("name", ROWS)
def test_a_file_of_one_wrong_row(good, refused, tmp_path, capsys, name):
    row, file = ROWS[name], tmp_path / "given.jsonl"
    data = row if isinstance(row, bytes | str) else json.dumps(row)
    file.write_bytes(data if isinstance(data, bytes) else data.encode())
    out = ["--max-tokens", 2, "--out", tmp_path / "out", "--threads", 1]
    lines = [refused(*zero(good, tmp_path, "--problems", file))]
    lines.append(refused("evaluate", "--model", good, "--benchmark", file, *out))
    if name != "long_answer":
        lines.append(refused(*sft(good, tmp_path, file)))
    if "prompt" not in str(row):
        lines.append(refused("generate", "--model", good, "--prompts", file, *out))
    assert all("given" in line for line in lines), lines
    assert main(["grade", str(file), str(tmp_path / "graded")]) == 0
    counts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not counts["correct"] and not counts["incorrect"]


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b"[1, 2]"], ids=repr)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_of_a_model(good, refused, tmp_path, name, damage):
    model = tmp_path / "model"
    shutil.copytree(good, model)
    (model / name).write_bytes(damage)
    (tmp_path / "p.jsonl").write_text('{"prompt": "hi"}')
    for words in (
        ["evaluate", "--model", model, "--benchmark", "generator:sum", "--limit", 1],
        ["generate", "--model", model, "--prompts", tmp_path / "p.jsonl"],
    ):
        if not (name == "generation_config.json" and damage == b"[]"):  # as good as an empty object
            line = refused(*words, "--max-tokens", 2, "--out", tmp_path / "out", "--threads", 1)
            assert str(model) in line
    if not (name == "generation_config.json" and damage == b"[]"):
        assert str(model) in refused(*zero(model, tmp_path))


@pytest.mark.parametrize("change", CONFIGS, ids=str)
def test_a_config_of_wrong_values(good, refused, tmp_path, change):
    model = tmp_path / "model"
    shutil.copytree(good, model)
    config = json.loads((model / "config.json").read_text()) | change
    (model / "config.json").write_text(json.dumps(config))
    words = ["evaluate", "--model", model, "--benchmark", "generator:sum", "--limit", 1, "--max-tokens", 2]
    assert str(model) in refused(*words, "--out", tmp_path / "out", "--threads", 1)


@pytest.mark.parametrize("text", TOMLS, ids=repr)
def test_a_config_file(good, refused, tmp_path, text):
    (tmp_path / "c.toml").write_bytes(text)
    refused("zero", "--config", tmp_path / "c.toml", "--init-from", good)


STAGES = ("pretrain", "zero", "sft", "grpo", "reject", "distill", "eval", "report")


@pytest.mark.parametrize("stage", STAGES)
def test_a_place_that_is_no_folder_and_a_name_that_is_none(refused, tmp_path, stage):
    (tmp_path / "file").write_text("x")
    config = ["--config", ROOT / f"configs/micro/{stage}.toml"]
    for runs in (tmp_path / "file", tmp_path / "file/below", "/proc/none"):
        refused(stage, *config, "--runs", runs)
    for name in ("../up", "x" * 300, "\udcff", "", "a b"):
        assert "--name" in refused(stage, *config, "--runs", tmp_path / "runs", "--name", name)
    for file in (tmp_path / "file", tmp_path, "__none"):
        refused(stage, "--config", file)


@pytest.mark.parametrize(
    "source", ["hub:", "hub:a", "hub:a:b:c:d", "generator:", "generator:x", "__x", "", "/", "."]
)
def test_a_source_that_is_none(good, refused, tmp_path, source):
    refused(*zero(good, tmp_path, "--problems", source))
    refused("evaluate", "--model", good, "--benchmark", source, "--out", tmp_path / "out")


def test_a_value_may_begin_with_underscores(refused, tmp_path):
    config = ["--config", ROOT / "configs/micro/zero.toml", "--runs", tmp_path]
    for words in (["--name", "__x"], ["--name=__x"]):
        assert "__x/pretrain/model" in refused("zero", *config, *words)
    assert "__x" in refused("grade", "__x", "__y")


@pytest.mark.parametrize(
    "template", ["{{ 1/0 }}", "{% for %}", "{{ messages[0].x.y }}", "{{ raise_exception('no') }}"]
)
def test_a_chat_template_that_cannot_be_used(good, refused, tmp_path, template):
    model = tmp_path / "model"
    shutil.copytree(good, model)
    (model / "chat_template.jinja").write_text(template)
    words = [
        "evaluate",
        "--model",
        model,
        "--benchmark",
        "generator:sum",
        "--limit",
        1,
        "--out",
        tmp_path / "out",
    ]
    (tmp_path / "c.jsonl").write_text(json.dumps(TRACE))
    for line in (
        refused(*words, "--max-tokens", 2),
        refused(*zero(model, tmp_path, "--template", "r1")),
        refused(*sft(model, tmp_path, tmp_path / "c.jsonl")),
    ):
        assert "the tokenizer's chat template fails" in line
