"""The generate command: its contract, on a native and a dense checkpoint."""

import dataclasses
import json
import subprocess
import sys

import pytest

from pipeline.__main__ import main
from pipeline.settings.tools import GenerateSettings
from tests import small


@pytest.fixture(scope="module")
def llama_dir(llama, tokenizer, tmp_path_factory):
    """A dense checkpoint with a tokenizer; its vocabulary is cut to the model's by the prompts used here."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(**{**llama.config.to_dict(), "vocab_size": len(tokenizer)})
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def generate(tmp_path, model, lines, *flags):
    """Exit code of the command over these lines, and the rows it wrote."""
    (tmp_path / "in.jsonl").write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    out = tmp_path / "out" / "rollouts.jsonl"
    argv = ["--model", str(model), "--prompts", str(tmp_path / "in.jsonl"), "--out", str(out), *flags]
    code = main(["generate", *argv])
    return code, [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("engine", ["native", "dense", "auto"])
def test_token_ids_in_rollouts_out_in_order(tmp_path, deepseek_dir, capfd, engine, dtype):
    lines = [{"token_ids": [5, 6, 7]}, "", {"token_ids": [9]}, {"token_ids": [3, 4]}]
    flags = ["--samples", "3", "--max-tokens", "6", "--temperature", "0.8", "--seed", "4", "--ignore-eos"]
    code, rows = generate(tmp_path, deepseek_dir, lines, "--engine", engine, "--dtype", dtype, *flags)
    assert code == 0
    assert [(row["index"], row["sample"]) for row in rows] == [(i, s) for i in range(3) for s in range(3)]
    for row in rows:
        assert list(row) == ["index", "sample", "token_ids", "logprobs", "text", "finish_reason"]
        assert len(row["token_ids"]) == len(row["logprobs"]) == 6 and row["finish_reason"] == "length"
        assert row["text"] is None  # no tokenizer
    summary = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert list(summary) == ["rollouts", "tokens", "seconds", "tokens_per_s", "engine"]
    assert (summary["rollouts"], summary["tokens"]) == (9, 54)
    assert summary["engine"] == ("dense" if engine == "dense" else "native")
    assert summary["tokens_per_s"] == pytest.approx(54 / summary["seconds"], rel=1e-2)
    again = generate(tmp_path, deepseek_dir, lines, "--engine", engine, "--dtype", dtype, *flags)
    assert again == (0, rows)


def test_text_in_text_out(tmp_path, llama_dir, tokenizer):
    lines = [{"prompt": "3+4=?"}, {"token_ids": tokenizer.encode("3+4=?")}]
    code, rows = generate(tmp_path, llama_dir, lines, "--max-tokens", "8", "--temperature", "0")
    assert code == 0 and rows[0]["token_ids"] == rows[1]["token_ids"]
    ids = [i for i in rows[0]["token_ids"] if i not in tokenizer.all_special_ids]
    assert rows[0]["text"] == tokenizer.decode(ids)


def test_stop_strings_min_tokens_and_speculation(tmp_path, tokenizer, capfd):
    folder = tmp_path / "moe"
    small.random_policy(folder, tokenizer, "raw", initializer_range=0.1)
    lines = [{"prompt": "3+4=?"}, {"prompt": "What is it?"}]
    flags = ["--samples", "4", "--max-tokens", "24", "--seed", "1", "--ignore-eos"]
    _, endless = generate(tmp_path, folder, lines, *flags)
    stop = next(t for t in (row["text"][2:4] for row in endless) if len(t) == 2 and t.isascii())
    code, rows = generate(tmp_path, folder, lines, *flags[:-1], "--stop", stop, "--local.speculate")
    cut = [row["token_ids"] for row in rows if stop in tokenizer.decode(row["token_ids"])]
    assert code == 0 and cut and not any(stop in tokenizer.decode(ids[:-1]) for ids in cut)
    summary = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert list(summary)[-1] == "mtp_acceptance" and 0 <= summary["mtp_acceptance"] <= 1
    for row, full in zip(rows, endless, strict=True):
        if tokenizer.eos_token_id not in full["token_ids"]:
            assert row["token_ids"] == full["token_ids"][: len(row["token_ids"])]
    code, rows = generate(tmp_path, folder, lines, *flags[:-1], "--stop", stop, "--min-tokens", "20")
    assert code == 0 and all(len(row["token_ids"]) >= 20 for row in rows)
    code, rows = generate(tmp_path, folder, lines, *flags, "--local.cache-gib", "1e-6")
    assert code == 2 and "cache_gib allows 1,073" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("lines", "flags", "message"),
    [
        ([{"prompt": "hi"}], [], ":1: the model has no tokenizer"),
        ([{"token_ids": [3]}, "{oops"], [], ":2: not a line of JSON"),
        ([{"token_ids": [3]}, "", {"text": "hi"}], [], ":3: expected"),
        ([{"token_ids": [3, "4"]}], [], ":1: expected"),
        ([{"token_ids": 3}], [], ":1: expected"),
        (["[3, 4]", "[5]"], [], ":1: expected a JSON object, found list"),
        ([{"token_ids": []}], [], ":1: the prompt is empty"),
        ([{"token_ids": [10**6]}], [], "prompt 0 has token id 1000000"),
        ([{"token_ids": [3] * 64}], [], "prompt 0 has 64 tokens"),
        ([], [], "has no prompts"),
        ([{"token_ids": [3]}], ["--engine", "vllm"], "vLLM is not installed in this environment"),
        ([{"token_ids": [3]}], ["--engine", "magic"], "native"),
        ([{"token_ids": [3]}], ["--samples", "0"], "samples=0"),
        ([{"token_ids": [3]}], ["--top-p", "0"], "top_p=0"),
        ([{"token_ids": [3]}], ["--sample", "2"], "did you mean --samples"),
    ],
)
def test_mistakes_get_one_line_and_exit_2(tmp_path, deepseek_dir, capsys, lines, flags, message):
    code, rows = generate(tmp_path, deepseek_dir, lines, *flags)
    printed = capsys.readouterr().err.strip()
    assert (code, rows) == (2, None)
    assert message in printed and printed.startswith("error: ") and "\n" not in printed


def test_missing_and_wrong_files_are_named(tmp_path, llama_dir, capsys):
    row = [{"token_ids": [3]}]
    assert generate(tmp_path, tmp_path / "no-model", row)[0] == 2
    assert "no-model" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert generate(tmp_path, tmp_path / "empty", row)[0] == 2
    assert "no config.json" in capsys.readouterr().err
    assert generate(tmp_path, llama_dir, row, "--engine", "native")[0] == 2
    assert "use engine dense" in capsys.readouterr().err
    argv = ["generate", "--model", str(llama_dir), "--prompts", str(tmp_path / "no.jsonl"), "--out"]
    assert main([*argv, str(tmp_path / "o.jsonl")]) == 2
    assert "no.jsonl" in capsys.readouterr().err
    (tmp_path / "in.jsonl").write_text(json.dumps(row[0]))
    argv[4] = str(tmp_path / "in.jsonl")
    assert main([*argv, str(tmp_path)]) == 2
    assert "directory" in capsys.readouterr().err


def test_help_does_not_wait_for_torch():
    """Every flag with its meaning, and nothing heavy imported."""
    script = (
        "import sys; from pipeline.__main__ import main\n"
        "try: main(['generate', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    for field in dataclasses.fields(GenerateSettings):
        assert f"--{field.name.replace('_', '-')}" in done.stdout
