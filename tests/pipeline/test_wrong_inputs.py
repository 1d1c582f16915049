"""Whatever a user can type, name or supply: one line that names it and says what to do, never a traceback.

Every command runs in this process on small files. `wrong.py` has the damage.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from pipeline.__main__ import main
from rollout.turns.engine import TurnEngine
from tests.pipeline import typed, wrong, wrong_scores
from tests.pipeline.evaluation.made_up import evaluation
from tests.small import llama, random_policy

CORRECT, USER_ERROR, GUARD = 0, 2, 3
ANY = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,=+-<>/"
"""Strings that end a turn: nearly every token has one of them."""
SUMS = '{"question": "1+1=?", "answer": "2"}\n{"question": "2+3=?", "answer": "5"}\n' * 4

# What each command takes, less the model; all of it small. MODEL stands for the model's folder.
WITH_MODEL = {
    "generate": "generate --model MODEL --prompts ids.jsonl --out out.jsonl --max-tokens 2",
    "generate text": "generate --model MODEL --prompts text.jsonl --out out.jsonl --max-tokens 2",
    "evaluate": "evaluate --model MODEL --benchmark sums.jsonl --out scores --max-tokens 4",
    "chat": "chat --model MODEL --max-tokens 4",
    "serve": "serve --model MODEL --port 0",
    "sft": "sft --config empty.toml --init-from MODEL --curated 2 --epochs 1"
    " --template r1-zero-short --max-length 96 --curated-task sum",
    "zero": "zero --config small.toml --init-from MODEL",
    "reject": "reject --config sample.toml --init-from MODEL",
    "eval": "eval --config empty.toml --models m=MODEL --benchmarks sums=sums.jsonl --extra-benchmarks"
    " --max-tokens 4",
    "distill": "distill --config teach.toml --corpus corpus.jsonl --init-from MODEL",
    "on_policy": "on_policy --config round.toml --init-from dense --teacher MODEL",
}

SMALL = """
template = "r1-zero-short"
steps = 1
prompts_per_step = 2
group_size = 2
max_tokens = 4
eval_every = 0
kl_coef = 0.1
checkpoint_every = 1
"""
ROUND = SMALL.replace("kl_coef = 0.1", "")
SAMPLE = """
template = "r1-zero-short"
problems = ["sums.jsonl"]
samples = 1
general = 0
max_tokens = 4
"""
TEACH = """
template = "r1-zero-short"
plain_control = false
max_length = 64
tokens_per_step = 128
steps = 1
log_every = 1
"""


@pytest.fixture(scope="module")
def right(tokenizer, tmp_path_factory) -> Path:
    """A folder in which every command above finds what it needs."""
    here = tmp_path_factory.mktemp("right")
    random_policy(here / "native", tokenizer, "r1-zero-short", max_position_embeddings=96)
    dense = llama(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, max_position_embeddings=96)
    dense.save_pretrained(here / "dense")
    tokenizer.save_pretrained(here / "dense")
    for kind in ("native", "dense"):
        if not (here / kind / "generation_config.json").exists():
            (here / kind / "generation_config.json").write_text('{"eos_token_id": 1}')
    (here / "ids.jsonl").write_text('{"token_ids": [5, 6, 7]}\n')
    (here / "text.jsonl").write_text('{"prompt": "1+1=?"}\n')
    (here / "sums.jsonl").write_text(SUMS)
    (here / "corpus.jsonl").write_text(
        '{"id": "a", "question": "1+1=?", "completion": "<answer> 2 </answer>", "answer": "2"}\n' * 4
    )
    for name, text in {"empty": "", "small": SMALL, "round": ROUND, "sample": SAMPLE, "teach": TEACH}.items():
        (here / f"{name}.toml").write_text(text)
    return here


@pytest.fixture
def here(right, root, tmp_path, monkeypatch) -> Path:
    """That folder, as this test's own working directory; models are links until they are damaged."""
    for file in right.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "configs").symlink_to(root / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    monkeypatch.delenv("R1_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


@pytest.fixture
def run(capsys, monkeypatch) -> Callable[[str], tuple[int, str]]:
    """Exit code and the error of a command line. An exception that escapes is the fault looked for."""

    def serve(*_: object, **__: object) -> None:
        raise AssertionError("the server would have run: the damage was not seen")

    def start(*_: object) -> None:
        raise AssertionError("a stage would have been started: its settings were not checked first")

    monkeypatch.setattr("uvicorn.Server.run", serve)
    monkeypatch.setattr("pipeline.tools.up.Children.run", start)
    monkeypatch.setattr("torch.set_num_threads", lambda threads: None)

    def go(line: str | list[str]) -> tuple[int, str]:
        code = main(line.split(" ") if isinstance(line, str) else line)
        errors = capsys.readouterr().err.splitlines()
        found = [text for text in errors if text.startswith(("error: ", "stopped: "))]
        assert (code in (USER_ERROR, GUARD)) == (len(found) == 1), errors
        assert not any("Traceback" in text for text in errors), errors
        assert not found or found[0] == errors[-1], errors
        return code, found[0] if found else ""

    return go


def damaged(here: Path, kind: str, maker: wrong.Maker) -> None:
    """A model `bad` in `here`: a copy of `kind` that `maker` has damaged."""
    shutil.copytree((here / kind).resolve(), here / "bad")
    maker(here / "bad")


def refused(said: tuple[int, str], *names: str) -> None:
    code, text = said
    assert code == USER_ERROR, said
    assert any(name in text for name in names), text
    assert len(text) < 900, text


@pytest.mark.parametrize("kind", ["native", "dense"])
@pytest.mark.parametrize("command", WITH_MODEL)
def test_what_is_right_is_accepted(here, run, command, kind):
    """Else the refusals below would prove nothing."""
    if command == "serve":
        with pytest.raises(AssertionError, match="would have run"):
            run(WITH_MODEL[command].replace("MODEL", kind))
        return
    code, text = run(WITH_MODEL[command].replace("MODEL", kind))
    if command == "reject":  # random weights solve nothing
        assert code == USER_ERROR and "kept nothing" in text, text
    else:
        assert (code, text) == (0, "")


@pytest.mark.parametrize("damage", wrong.MODELS)
@pytest.mark.parametrize("command", ["generate", "zero", "distill"])  # which load models in different ways
def test_a_damaged_model_is_named(here, run, command, damage):
    damaged(here, "dense" if command == "distill" else "native", wrong.MODELS[damage])
    refused(run(WITH_MODEL[command].replace("MODEL", "bad")), "bad")


@pytest.mark.parametrize("damage", wrong.MODELS)
def test_a_damaged_dense_model_is_named(here, run, damage):
    damaged(here, "dense", wrong.MODELS[damage])
    refused(run(WITH_MODEL["generate"].replace("MODEL", "bad")), "bad")


@pytest.mark.parametrize("damage", ["garbage config", "no weights", "cut weights", "tensor missing"])
@pytest.mark.parametrize("command", ["evaluate", "chat", "serve", "sft", "reject", "eval", "on_policy"])
def test_every_other_command_reads_models_alike(here, run, command, damage):
    damaged(here, "native", wrong.MODELS[damage])
    refused(run(WITH_MODEL[command].replace("MODEL", "bad")), "bad")


@pytest.mark.parametrize("content", wrong.CONTENTS, ids=repr)
@pytest.mark.parametrize("name", wrong.FILES)
@pytest.mark.parametrize("command", ["generate text", "evaluate", "zero"])
def test_another_content_of_a_file_is_named(here, run, command, name, content):
    damaged(here, "native", wrong.replaced(name, content))
    if (name, content) == ("generation_config.json", b"[]"):
        assert run(WITH_MODEL[command].replace("MODEL", "bad")) == (CORRECT, "")
    else:
        refused(run(WITH_MODEL[command].replace("MODEL", "bad")), "bad")


@pytest.mark.parametrize("change", wrong.CONFIGS, ids=str)
def test_a_config_of_another_model_is_named(here, run, change):
    damaged(here, "native", wrong.edited("config.json", **change))
    (here / "bad/generation_config.json").unlink()  # whose EOS wins
    refused(run(WITH_MODEL["evaluate"].replace("MODEL", "bad")), "bad")


@pytest.mark.parametrize("template", wrong.CHAT_TEMPLATES)
@pytest.mark.parametrize("command", ["evaluate", "zero", "sft"])
def test_a_chat_template_that_cannot_be_used(here, run, command, template):
    damaged(here, "native", wrong.replaced("chat_template.jinja", template))
    line = WITH_MODEL[command].replace("MODEL", "bad").replace(" --template r1-zero-short", "")
    code, text = run(f"{line} --template r1")
    assert code == USER_ERROR and "the tokenizer's chat template fails" in text, text


@pytest.mark.parametrize("damage", wrong.TOKENIZERS)
@pytest.mark.parametrize("command", ["generate text", "evaluate", "chat", "zero", "sft", "on_policy"])
def test_a_damaged_tokenizer_is_named(here, run, command, damage):
    damaged(here, "native", wrong.TOKENIZERS[damage])
    refused(run(WITH_MODEL[command].replace("MODEL", "bad")), "bad", "the model has no tokenizer")


@pytest.mark.parametrize("damage", wrong.HARMLESS)
@pytest.mark.parametrize("command", ["generate", "evaluate", "zero", "chat", "on_policy", "eval"])
def test_a_file_that_some_commands_read(here, run, command, damage):
    damaged(here, "native", wrong.HARMLESS[damage])
    code, text = run(WITH_MODEL[command].replace("MODEL", "bad"))
    assert code == CORRECT or "bad" in text, text


@pytest.mark.parametrize(
    "where", ["nowhere", "sums.jsonl", "ids.jsonl/x", "a/b/c/d", "bad\0name", "x" * 5_000]
)
@pytest.mark.parametrize(
    "command", ["generate", "evaluate", "sft", "zero", "reject", "eval", "distill", "on_policy", "chat"]
)
def test_a_model_that_is_none(here, run, command, where):
    refused(
        run(WITH_MODEL[command].replace("MODEL", where)), where[:40], "--model", "--init-from", "--teacher"
    )


ROWS_OF = {
    "zero": "zero --config small.toml --init-from native --problems bad.jsonl",
    "evaluate": "evaluate --model native --benchmark bad.jsonl --out scores --max-tokens 4",
    "sft": "sft --config empty.toml --init-from native --template r1-zero-short --corpus bad.jsonl",
    "generate": "generate --model native --prompts bad.jsonl --out out.jsonl --max-tokens 2",
    "reject": "reject --config sample.toml --init-from native --problems bad.jsonl",
}


@pytest.mark.parametrize("what", wrong.PROBLEMS)
@pytest.mark.parametrize("command", ["zero", "evaluate", "sft", "generate"])
def test_a_file_without_a_usable_row_is_named(here, run, command, what):
    (here / "bad.jsonl").write_bytes(wrong.PROBLEMS[what])
    if (command, what) == ("evaluate", "too long a question"):  # it counts as not solved
        assert run(ROWS_OF[command]) == (CORRECT, "")
    elif command != "generate" or what not in wrong.ARE_PROMPTS:
        refused(run(ROWS_OF[command]), "bad.jsonl", "of bad ")


@pytest.mark.parametrize("what", ["empty", "garbage", "no answer", "packed tests", "too long a question"])
def test_rejection_sampling_reads_problems_alike(here, run, what):
    (here / "bad.jsonl").write_bytes(wrong.PROBLEMS[what])
    refused(run(ROWS_OF["reject"]), "bad.jsonl", "of bad ")


@pytest.mark.parametrize("what", wrong.CORPORA)
@pytest.mark.parametrize(
    "line",
    [
        "sft --config empty.toml --init-from native --template r1-zero-short --corpus bad.jsonl",
        "distill --config teach.toml --init-from dense --corpus bad.jsonl",
    ],
    ids=["sft", "distill"],
)
def test_a_corpus_of_nothing_is_named(here, run, line, what):
    (here / "bad.jsonl").write_bytes(wrong.CORPORA[what])
    code, text = run(line)
    assert code in (USER_ERROR, GUARD) and "bad.jsonl" in text, (code, text)


@pytest.mark.parametrize("what", wrong.PROMPTS)
@pytest.mark.parametrize("kind", ["native", "dense"])
def test_prompts_that_cannot_be_answered_are_named(here, run, kind, what):
    (here / "bad.jsonl").write_bytes(wrong.PROMPTS[what])
    refused(run(f"generate --model {kind} --prompts bad.jsonl --out out.jsonl --max-tokens 2"), "bad.jsonl")


@pytest.mark.parametrize("what", [*wrong.PROBLEMS, *wrong.PROMPTS])
def test_grade_answers_every_line(here, run, what):
    (here / "bad.jsonl").write_bytes((wrong.PROBLEMS | wrong.PROMPTS)[what])
    assert run("grade bad.jsonl graded.jsonl")[0] == CORRECT
    rows = map(json.loads, (here / "graded.jsonl").read_text().splitlines())
    assert {row["verdict"] for row in rows} <= {"error"}


@pytest.mark.parametrize("damage", wrong_scores.EVALUATIONS)
def test_a_damaged_evaluation_is_named(here, run, damage):
    for name in ("right", "wrong"):
        evaluation(here / "ev" / name, [[True], [False]] * 3)
    assert run("compare ev/right ev/wrong --out page.html") == (CORRECT, "")
    wrong_scores.EVALUATIONS[damage](here / "ev" / "wrong")
    for line in ("compare ev/right ev/wrong", "compare ev/wrong ev/right"):
        refused(run(line), "ev/wrong")
    assert run("leaderboard ev --json all.json") == (CORRECT, "")


@pytest.mark.parametrize("what", wrong.ENVIRONMENTS)
@pytest.mark.parametrize("command", ["zero", "evaluate"])
def test_an_environment_that_fails_is_named(here, run, monkeypatch, command, what):
    """A fault of its module is refused; one of a rollout is counted, and too many stop the command."""
    text, says = wrong.ENVIRONMENTS[what]
    name = f"r1_wrong_{command}_{list(wrong.ENVIRONMENTS).index(what)}"
    (here / f"{name}.py").write_text(f"{text}\nif 'play' in globals(): play.stop = tuple('{ANY}')\n")
    where = {"zero": "pipeline.stages.grpo", "evaluate": "pipeline.evaluation.evaluate"}[command]
    monkeypatch.setattr(f"{where}.TurnEngine", partial(TurnEngine, timeout_s=0.5))
    more = {"zero": " --steps 2 --max-tokens 8", "evaluate": ""}[command]
    line = WITH_MODEL[command].replace("MODEL", "native") + more
    code, told = run(f"{line} --environment {name}:play --max-error-share 0")
    early = what in ("cannot be imported", "has no such function")
    assert code == (USER_ERROR if early else GUARD if says else CORRECT), told
    assert says in told or (command == "zero" and "the verifier failed" in told), told


@pytest.fixture(scope="module")
def begun(right, tmp_path_factory) -> Path:
    """The run directory of an RL stage that was stopped after its first of two steps."""
    from pipeline.run.directory import RunDir

    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("begun")
    patch.chdir(folder)
    for file in right.iterdir():
        (folder / file.name).symlink_to(file)
    log = RunDir.log

    def stop_after_one(self: RunDir, step: int, *rest: object) -> None:
        log(self, step, *rest)
        self.interrupted = True

    patch.setattr(RunDir, "log", stop_after_one)
    assert main(RESUMED.removesuffix(" --resume").split()) == 130
    patch.undo()
    return folder / "runs"


RESUMED = "zero --config small.toml --init-from native --steps 2 --resume"


def test_a_right_run_goes_on(here, run, begun):
    shutil.copytree(begun, here / "runs")
    assert run(RESUMED) == (0, "")


@pytest.mark.parametrize("damage", wrong.RUNS)
def test_a_damaged_run_directory_is_named(here, run, begun, damage):
    shutil.copytree(begun, here / "runs")
    maker, name = wrong.RUNS[damage]
    maker(here / "runs/tiny/zero")
    code, text = run(RESUMED)
    assert code == USER_ERROR and name in text, (code, text)


@pytest.mark.parametrize("line", [b"{", b"\xff\xfe\n", b"[]\n", b'{"step": "x"}\n', b"null\n", b"\n\n"])
def test_a_damaged_line_of_a_log_costs_that_line(here, run, begun, line):
    shutil.copytree(begun, here / "runs")
    for name in ("metrics.jsonl", "samples.jsonl"):
        file = here / "runs/tiny/zero" / name
        file.write_bytes(line + file.read_bytes())
    assert run(RESUMED) == (CORRECT, "")


@pytest.mark.parametrize("text", typed.TOMLS, ids=repr)
def test_a_config_file_that_is_none(here, run, text):
    (here / "bad.toml").write_bytes(text)
    refused(run("zero --config bad.toml --init-from native"), "")


@pytest.mark.parametrize(
    "stage", ["pretrain", "zero", "sft", "grpo", "reject", "student", "distill", "eval", "report"]
)
def test_no_folder_and_no_name(here, run, stage):
    line = [stage, "--config", f"configs/micro/{stage}.toml"]
    for runs in ("sums.jsonl", "sums.jsonl/below", "/proc/none"):
        refused(run([*line, "--runs", runs]), "")
    for name in ("../up", "x" * 300, "\udcff", "", "a b"):
        refused(run([*line, "--name", name]), "--name")
    for file in ("sums.jsonl", ".", "__none"):
        refused(run([stage, "--config", file]), "")


@pytest.mark.parametrize(("line", "says"), typed.LINES)
def test_what_is_typed_wrong_is_named(here, run, line, says):
    code, text = run(line)
    assert code == USER_ERROR, (code, text)
    assert says in text or says.replace("--", "").replace("-", "_") in text, text
