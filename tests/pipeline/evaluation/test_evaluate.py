"""One model on one benchmark: what is written, what is refused, what is used again."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pipeline.__main__ import main
from pipeline.arguments import parse
from pipeline.errors import UserError
from pipeline.evaluation.evaluate import evaluate
from pipeline.settings.evaluate import EvaluateSettings
from rollout.text.tokenizer import template_hash


def rows_of(out):
    return [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()]


def says(question, sample):
    """1+1 right twice of two in format, 2+2 once, 3+3 never ends, the program right once."""
    if question.startswith("1+1"):
        return "<think>\none and one\n</think>\n<answer>\n2\n</answer>"
    if question.startswith("2+2"):
        return "The answer is 4." if sample == 0 else "5"
    if question.startswith("3+3"):
        return "so " * 60
    return f"```python\ndef f(): return {2 + sample}\n```"


@pytest.fixture
def config(stub, sums, tmp_path):
    return {
        "model": stub(template="r1-zero-short"), "benchmark": str(sums), "out": tmp_path / "out",
        "samples": 2, "max_tokens": 40, "temperature": 0.0, "top_p": 1.0,
    }  # fmt: skip


def test_scores_and_generations_say_what_happened(config, scripted, tokenizer):
    engines = scripted(says)
    got = evaluate(EvaluateSettings(**config, max_batch=3))
    (engine,) = engines
    assert engine.closed and engine.max_batch == 3
    assert got == json.loads((config["out"] / "scores.json").read_text())
    assert got["pass@1"] == pytest.approx((1 + 0.5 + 0 + 0 + 0.5) / 5)
    assert got["pass@k"] == got["pass@2"] == pytest.approx(3 / 5)
    assert got["cons@k"] == pytest.approx((1 + 0.5) / 4), "2+2 is a tie; the program does not vote"
    assert (got["n"], got["k"], got["prompts_too_long"], got["verifier_failures"]) == (5, 2, 1, 0)
    assert got["truncation_rate"] == pytest.approx(2 / 8) and got["format_rate"] == pytest.approx(2 / 8)
    assert got["template"] == "r1-zero-short"
    assert got["template_hash"] == template_hash(tokenizer, "r1-zero-short")
    assert got["sampling"] == {"temperature": 0.0, "top_p": 1.0, "max_tokens": 40, "seed": 0}
    assert len(got["model_hash"]) == 64

    rows = rows_of(config["out"])
    assert [(r["id"], r["sample"]) for r in rows] == [
        (i, s) for i in ("a", "b", "c", "long", "code") for s in (0, 1)
    ]
    a, b0, b1, c, long, code0, code1 = (rows[i] for i in (0, 2, 3, 4, 6, 8, 9))
    assert (a["verdict"], a["extracted"], a["finish_reason"]) == ("correct", "2", "stop")
    assert (
        a["parts"] == {"accuracy": 1.0, "format": 1.0, "language": 1.0, "repetition": 0.0}
        and a["tokens"] > 10
    )
    assert (b0["verdict"], b0["extracted"], b1["verdict"], b1["extracted"]) == (
        "correct",
        "4",
        "incorrect",
        "5",
    )
    assert (c["finish_reason"], c["tokens"], c["verdict"]) == ("length", 40, "incorrect")
    assert long["detail"].startswith("prompt longer than the context") and long["finish_reason"] is None
    assert (code0["verdict"], code1["verdict"], code1["extracted"]) == (
        "correct",
        "incorrect",
        "def f(): return 3",
    )


def test_prompts_that_do_not_fit_are_not_sent_and_completions_end_with_the_context(config, scripted):
    engines = scripted(says)
    evaluate(EvaluateSettings(**{**config, "max_tokens": 32_768}))
    ((prompts, sampling),) = engines[0].calls
    assert [p.problem.id for p in prompts] == ["a", "b", "c", "code"]
    assert sampling.max_tokens == 128 - min(len(p.token_ids) for p in prompts)


def test_when_no_prompt_fits_the_model_is_wrong_but_nothing_breaks(config, scripted, sums):
    engines = scripted(says)
    sums.write_text(json.dumps({"problem": "9" * 190, "answer": "1"}) + "\n")
    got = evaluate(EvaluateSettings(**config))
    assert (got["pass@1"], got["prompts_too_long"], got["format_rate"]) == (0, 1, None) and not engines[
        0
    ].calls


def test_the_same_question_again_is_answered_from_the_folder(config, scripted):
    engines = scripted(says)
    first = evaluate(EvaluateSettings(**config))
    assert evaluate(EvaluateSettings(**config)) == first and len(engines) == 1
    assert not config["out"].with_name("out.partial").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"samples": 3},
        {"temperature": 0.5},
        {"top_p": 0.9},
        {"max_tokens": 39},
        {"limit": 2},
        {"template": "raw"},
        {"seed": 1},
        {"dtype": "bfloat16"},
        {"engine": "dense"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_question_is_refused_where_scores_lie(config, scripted, change):
    scripted(says)
    evaluate(EvaluateSettings(**config))
    before = (config["out"] / "generations.jsonl").read_bytes()
    with pytest.raises(UserError, match="take another --out"):
        evaluate(EvaluateSettings(**{**config, **change}))
    assert (config["out"] / "generations.jsonl").read_bytes() == before


def test_another_model_or_problem_is_another_question(config, scripted, sums):
    scripted(says)
    evaluate(EvaluateSettings(**config))
    (config["model"] / "weights").write_text("new")
    with pytest.raises(UserError, match="model_sha256"):
        evaluate(EvaluateSettings(**config))
    (config["model"] / "weights").unlink()
    sums.write_text(sums.read_text().replace('"4"', '"5"'))
    with pytest.raises(UserError, match="problems_sha256"):
        evaluate(EvaluateSettings(**config))


def test_a_folder_of_someone_else_is_left_alone(config, scripted):
    engines = scripted(says)
    config["out"].mkdir()
    (config["out"] / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no evaluation of ours"):
        evaluate(EvaluateSettings(**config))
    assert not engines and (config["out"] / "thesis.txt").read_text() == "mine"


def test_a_crash_leaves_a_folder_that_goes_on(config, scripted):
    def crash(question, sample):
        raise RuntimeError("out of memory")

    engines = scripted(crash)
    with pytest.raises(RuntimeError):
        evaluate(EvaluateSettings(**config))
    assert engines[0].closed and not (config["out"] / "scores.json").exists()
    scripted(says)
    assert evaluate(EvaluateSettings(**config))["n"] == 5


@pytest.mark.parametrize(
    ("about", "math", "code"),
    [
        ({"template": "r1"}, "r1", "r1"),
        ({"r1_template": "raw"}, "raw", "raw"),
        ({}, "boxed", "r1"),  # this tokenizer's chat template opens the thinking
    ],
)
def test_auto_takes_the_template_that_the_model_knows(config, scripted, stub, about, math, code):
    engines = scripted(says)
    evaluate(EvaluateSettings(**{**config, "model": stub("other", **about)}))
    used = {p.problem.id: p.template for p in engines[0].calls[0][0]}
    assert used["a"] == math and used["code"] == code


def test_user_errors_are_one_line(config, tmp_path, capsys, scripted):
    scripted(says)
    flags = ["--benchmark", config["benchmark"], "--out", str(config["out"])]
    for argv, words in [
        (["--model", str(tmp_path / "none"), *flags], "no model at"),
        (["--model", str(config["model"]), *flags, "--template", "poem"], "unknown template 'poem'"),
        (["--model", str(config["model"]), *flags, "--limit", "0"], "limit=0"),
        (["--model", str(config["model"]), *flags, "--samplez", "0"], "did you mean --samples"),
        (["--model", str(config["model"]), *flags, "--top-p", "2"], "top_p=2"),
        (["--model", str(config["model"])], "--out"),
    ]:
        assert main(["evaluate", *argv]) == 2
        error = capsys.readouterr().err.strip()
        assert words in error and "\n" not in error
    assert not config["out"].exists()


def test_help_does_not_import_torch():
    code = "import sys\nfrom pipeline.__main__ import main\n"
    code += "try: main(['evaluate', '--help'])\nexcept SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "assert 'torch' not in sys.modules and 'datasets' not in sys.modules"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "--max-tokens" in done.stdout, done.stderr


def test_defaults_are_the_papers():
    config = parse(EvaluateSettings, ["--model", "m", "--benchmark", "b", "--out", "o"], "evaluate")
    assert (config.temperature, config.top_p, config.max_tokens) == (0.6, 0.95, 32_768)


@pytest.mark.parametrize("engine", ["native", "dense"])
def test_a_real_checkpoint_end_to_end(checkpoint, tmp_path, engine, capsys):
    argv = [
        "evaluate",
        "--model",
        str(checkpoint),
        "--benchmark",
        "heldout",
        "--limit",
        "6",
        "--samples",
        "2",
    ]
    argv += ["--max-tokens", "12", "--out", str(tmp_path / "out"), "--engine", engine]
    assert main(argv) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 12 and last["n"] == 6 and last["template"] == "r1-zero-short"
    tokens = [r["tokens"] for r in rows if r["finish_reason"]]
    assert last["mean_tokens"] == pytest.approx(sum(tokens) / len(tokens)) and max(tokens) <= 12
