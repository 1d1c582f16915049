"""The whole chain, every stage, at micro size: it runs, it is deterministic, and a kill loses nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.__main__ import main
from pipeline.data.corpus import read_corpus, split_blocks
from pipeline.run.metrics import GLOSSARY, explained

ROOT = Path(__file__).parent.parent
CHAIN = ("pretrain", "zero", "sft", "grpo", "reject", "sft2", "grpo2", "student", "distill", "eval", "report")
MODELS = {"base", "zero", "dev1", "dev2", "dev3", "r1", "student", "student_plain"}


def command(stage: str, runs: Path, *extra: str) -> list[str]:
    config = str(ROOT / "configs/micro" / f"{stage}.toml")
    threads = [] if stage == "report" else ["--threads", "1"]  # it computes nothing
    return [stage, "--config", config, "--runs", str(runs), *threads, *extra]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of runs in which the micro chain has been run once."""
    folder = tmp_path_factory.mktemp("runs")
    for stage in CHAIN:
        assert main(command(stage, folder)) == 0, stage
    return folder


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def without_times(path: Path) -> list[dict]:
    return [
        {k: v for k, v in row.items() if not k.startswith("time/") and "_per_s" not in k}
        for row in rows(path)
    ]


def test_summary_keeps_its_contract(runs):
    summary = json.loads((runs / "micro/summary.json").read_text())
    assert set(summary["models"]) == MODELS
    for scores in summary["models"].values():
        heldout = scores["heldout"]
        assert set(heldout) >= {
            "pass@1", "n", "interval", "format_rate", "language_consistency", "mean_tokens",
        }  # fmt: skip
        assert (
            heldout["n"] == 20
            and 0 <= heldout["interval"][0] <= heldout["pass@1"] <= heldout["interval"][1] <= 1
        )
    assert summary["seconds"] > 0 and summary["peak_rss_bytes"] > 1e8 and summary["seed"] == 0


def test_every_stage_leaves_its_record(runs):
    for stage in CHAIN:
        folder = runs / "micro" / stage
        env = json.loads((folder / "env.json").read_text())
        assert env["packages"]["torch"] and "commit" in env
        assert (folder / "config.toml").exists() and json.loads((folder / "done.json").read_text())[
            "seconds"
        ] > 0
        for row in rows(folder / "metrics.jsonl"):
            assert set(map(explained, row)) - {"step"} <= set(GLOSSARY)
    inputs = json.loads((runs / "micro/sft2/env.json").read_text())["inputs"]
    assert {Path(p).name for p in inputs} == {"model", "corpus.jsonl", "the corpus of this stage"}


def test_each_model_differs_from_the_one_it_started_from(runs):
    for stage, start in (("zero", "pretrain"), ("sft", "pretrain"), ("grpo", "sft"), ("grpo2", "sft2")):
        new, old = (load_file(runs / "micro" / s / "model/model.safetensors") for s in (stage, start))
        assert new.keys() == old.keys()
        assert any(not torch.equal(new[k], old[k]) for k in new)


def test_the_corpus_holds_only_right_answers_in_format(runs):
    corpus = read_corpus(runs / "micro/reject/corpus.jsonl")
    assert any(row.source.startswith("reject:") for row in corpus)
    for row in corpus:
        blocks = split_blocks(row.completion)
        assert blocks and blocks[1] == row.answer
        if row.source.startswith("reject:"):
            assert eval(re.search(r"\d[\d+-]*", row.question)[0]) == int(row.answer)


def test_finished_models_load_in_transformers(runs):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import model
    from rollout.text.tokenizer import load_tokenizer

    path = runs / "micro/grpo2/model"
    tokenizer = AutoTokenizer.from_pretrained(path)
    chat = [{"role": "user", "content": "1+2?"}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids["input_ids"]).logits
    ours = model.load(path).eval().logits(ids["input_ids"])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert load_tokenizer(runs / "micro/distill/student/model").get_vocab() == tokenizer.get_vocab()


def test_a_used_directory_is_never_overwritten(runs, capsys):
    before = (runs / "micro/grpo/metrics.jsonl").read_bytes()
    assert main(command("grpo", runs)) == 2
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0 and "finished" in said and "--name" in said
    assert (runs / "micro/grpo/metrics.jsonl").read_bytes() == before


def copy_inputs(runs: Path, name: str, *stages: str) -> None:
    for stage in stages:
        (runs / name / stage).parent.mkdir(exist_ok=True)
        (runs / name / stage).symlink_to(runs / "micro" / stage)


def test_grpo_twice_is_the_same_run(runs):
    copy_inputs(runs, "twin", "sft")
    assert main(command("grpo", runs, "--name", "twin")) == 0
    assert without_times(runs / "twin/grpo/metrics.jsonl") == without_times(runs / "micro/grpo/metrics.jsonl")
    assert weights(runs / "twin/grpo") == weights(runs / "micro/grpo")


def weights(stage: Path) -> bytes:
    return (stage / "model/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("stage", "needs", "step"),
    [
        ("grpo", "sft", 3),
        ("pretrain", "", 40),
        ("student", "pretrain", 10),  # before its rule fires
        ("student", "pretrain", 20),  # after it
    ],
)
def test_killed_and_resumed_is_the_same_run(runs, stage, needs, step):
    """kill -9 some steps after a checkpoint, then --resume: the same bits, in weights and metrics."""
    name = f"killed-{stage}-{step}"
    if needs:
        copy_inputs(runs, name, needs)
    argv = [sys.executable, "-m", "pipeline", *command(stage, runs, "--name", name)]
    metrics = runs / name / stage / "metrics.jsonl"
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if metrics.exists() and any(row["step"] >= step for row in rows(metrics)):
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.02)
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    assert not (runs / name / stage / "model").exists()
    assert main(command(stage, runs, "--name", name, "--resume")) == 0
    assert without_times(metrics) == without_times(runs / "micro" / stage / "metrics.jsonl")
    assert weights(runs / name / stage) == weights(runs / "micro" / stage)


def test_a_missing_input_says_what_makes_it(runs, capsys):
    assert main(command("sft2", runs, "--name", "nothing")) == 2
    assert "make pretrain ARGS='--name nothing --runs " in capsys.readouterr().err


def test_a_corrupted_checkpoint_is_refused_by_name(runs, capsys):
    copy_inputs(runs, "broken", "sft")
    assert main(command("grpo", runs, "--name", "broken")) == 0
    folder = runs / "broken/grpo"
    (folder / "done.json").unlink()
    state = folder / "checkpoint-2/state.pt"
    state.write_bytes(state.read_bytes()[:-100])
    assert main(command("grpo", runs, "--name", "broken", "--resume")) == 2
    assert "checkpoint-2/state.pt does not match its manifest" in capsys.readouterr().err


def test_a_corrupted_model_is_refused_by_name(runs, capsys):
    broken = runs / "truncated/sft/model"
    broken.mkdir(parents=True)
    for file in (runs / "micro/sft/model").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights_file = broken / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:1000])
    assert main(command("grpo", runs, "--name", "truncated")) == 2
    assert "model.safetensors" in capsys.readouterr().err


def test_rl_takes_a_dense_policy_too(runs):
    """GRPO on the distilled student: the same loop over a transformers model and the dense engine."""
    student = str(runs / "micro/distill/student/model")
    assert main(command("grpo", runs, "--name", "dense", "--init-from", student, "--steps", "2")) == 0
    logged = rows(runs / "dense/grpo/metrics.jsonl")
    assert [row["step"] for row in logged] == [1, 2]
    assert all(row["policy/mismatch_max"] < 1e-3 for row in logged if "policy/mismatch_max" in row)
    new, old = (load_file(Path(p) / "model.safetensors") for p in (runs / "dense/grpo/model", student))
    assert new.keys() == old.keys() and any(not torch.equal(new[k], old[k]) for k in new)


def test_a_run_that_could_not_begin_leaves_no_directory_in_the_way(runs, capsys):
    student = str(runs / "micro/sft/model")
    argv = command("grpo", runs, "--name", "typo", "--init-from", student, "--steps", "1", "--problems")
    assert main([*argv, "nothere.jsonl"]) == 2
    assert "nothere.jsonl" in capsys.readouterr().err
    assert not (runs / "typo/grpo").exists()
    assert main([*argv, "generator:sum"]) == 0


def test_students_are_compared_in_one_table(runs, capsys):
    """Every way to teach the student, and what each stage trained on and sampled."""
    for stage in ("on_policy", "student_rl", "distill_rl", "students"):
        assert main(command(stage, runs)) == 0, stage
    out = capsys.readouterr().out
    state = json.loads((runs / "micro/students/scores.json").read_text())
    labels = ["base", "traces", "on_policy", "rl", "both", "plain", "teacher"]
    assert list(state["scores"]) == labels and not state["not_made"] and not state["not_scored"]
    kinds = {label: set(model.get("tokens", ())) for label, model in state["models"].items()}
    own = {"trained", "sampled"}
    assert {label for label, kind in kinds.items() if kind == own} == {"on_policy", "rl", "both", "teacher"}
    assert kinds["traces"] == kinds["plain"] == {"trained"} and kinds["base"] == set()
    for name, value in state["models"]["on_policy"]["tokens"].items():
        assert f"{value:,}" in out and name in out
    starts = {"on_policy": "student", "student_rl": "student", "distill_rl": "distill/student"}
    for stage, start in starts.items():
        inputs = json.loads((runs / "micro" / stage / "env.json").read_text())["inputs"]
        assert str(runs / "micro" / start / "model") in inputs
