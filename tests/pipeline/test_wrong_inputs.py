"""Whatever a user can type, name or supply: one line that names it and says what to do, never a traceback.

Every command runs in this process on small files. `wrong.py` has the damage.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.__main__ import main
from tests.pipeline import wrong
from tests.small import llama, random_policy

CORRECT, USER_ERROR, GUARD = 0, 2, 3
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
}

SMALL = """
template = "r1-zero-short"
steps = 1
prompts_per_step = 2
group_size = 2
max_tokens = 4
eval_every = 0
kl_coef = 0.0
checkpoint_every = 1
"""
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
    for name, text in {"empty": "", "small": SMALL, "sample": SAMPLE, "teach": TEACH}.items():
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

    def listen(*_: object, **__: object) -> None:
        raise AssertionError("the server would have listened: the damage was not seen")

    def start(*_: object) -> None:
        raise AssertionError("a stage would have been started: its settings were not checked first")

    monkeypatch.setattr("socket.socket.listen", listen)
    monkeypatch.setattr("pipeline.tools.up.Children.run", start)
    monkeypatch.setattr("torch.set_num_threads", lambda threads: None)

    def go(line: str) -> tuple[int, str]:
        code = main(line.split(" "))
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
        with pytest.raises(AssertionError, match="would have listened"):
            run(WITH_MODEL[command].replace("MODEL", kind))
        return
    code, text = run(WITH_MODEL[command].replace("MODEL", kind))
    if command == "reject":  # random weights solve nothing
        assert code == USER_ERROR and "kept nothing" in text, text
    else:
        assert (code, text) == (0, "")


@pytest.mark.parametrize("damage", wrong.MODELS)
@pytest.mark.parametrize("command", ["generate", "evaluate", "sft", "zero", "distill"])
def test_a_damaged_model_is_named(here, run, command, damage):
    damaged(here, "dense" if command == "distill" else "native", wrong.MODELS[damage])
    refused(run(WITH_MODEL[command].replace("MODEL", "bad")), "bad")


@pytest.mark.parametrize("damage", wrong.MODELS)
def test_a_damaged_dense_model_is_named(here, run, damage):
    damaged(here, "dense", wrong.MODELS[damage])
    refused(run(WITH_MODEL["generate"].replace("MODEL", "bad")), "bad")


@pytest.mark.parametrize("damage", ["garbage config", "no weights", "cut weights", "tensor missing"])
@pytest.mark.parametrize("command", ["chat", "serve", "reject", "eval"])
def test_every_other_command_reads_models_alike(here, run, command, damage):
    damaged(here, "native", wrong.MODELS[damage])
    refused(run(WITH_MODEL[command].replace("MODEL", "bad")), "bad")


@pytest.mark.parametrize("damage", wrong.TOKENIZERS)
@pytest.mark.parametrize("command", ["generate text", "evaluate", "chat", "zero", "sft"])
def test_a_damaged_tokenizer_is_named(here, run, command, damage):
    damaged(here, "native", wrong.TOKENIZERS[damage])
    refused(run(WITH_MODEL[command].replace("MODEL", "bad")), "bad")


@pytest.mark.parametrize("damage", wrong.HARMLESS)
@pytest.mark.parametrize("command", ["generate", "evaluate", "zero", "chat"])
def test_a_file_that_some_commands_read(here, run, command, damage):
    damaged(here, "native", wrong.HARMLESS[damage])
    code, text = run(WITH_MODEL[command].replace("MODEL", "bad"))
    assert code == CORRECT or "bad" in text, text


@pytest.mark.parametrize(
    "where", ["nowhere", "sums.jsonl", "ids.jsonl/x", "a/b/c/d", "bad\0name", "x" * 5_000]
)
@pytest.mark.parametrize(
    "command", ["generate", "evaluate", "sft", "zero", "reject", "eval", "distill", "chat"]
)
def test_a_model_that_is_none(here, run, command, where):
    refused(run(WITH_MODEL[command].replace("MODEL", where)), where[:40], "--model")


@pytest.mark.parametrize("what", wrong.PROBLEMS)
@pytest.mark.parametrize(
    "line",
    [
        "zero --config small.toml --init-from native --problems bad.jsonl",
        "reject --config sample.toml --init-from native --problems bad.jsonl",
        "evaluate --model native --benchmark bad.jsonl --out scores --max-tokens 4",
    ],
    ids=["zero", "reject", "evaluate"],
)
def test_a_file_without_problems_is_named(here, run, line, what):
    (here / "bad.jsonl").write_bytes(wrong.PROBLEMS[what])
    refused(run(line), "bad.jsonl", "bad")


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


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
@pytest.mark.parametrize("line", [b"{", b"\xff\xfe\n", b"[]\n", b'{"step": "x"}\n', b"null\n", b"\n\n"])
def test_a_damaged_line_of_a_log_costs_that_line(here, run, begun, name, line):
    shutil.copytree(begun, here / "runs")
    file = here / "runs/tiny/zero" / name
    file.write_bytes(line + file.read_bytes())
    code, text = run(RESUMED)
    assert code == CORRECT or name in text, (code, text)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("zero --config small.toml --init-from native --runs sums.jsonl", "--runs"),
        ("zero --config small.toml --init-from native --runs sums.jsonl/x", "--runs"),
        ("zero --config small.toml --init-from native --name __x/y", "--name"),
        ("zero --config small.toml --init-from native --name=", "--name"),
        ("zero --config small.toml --init-from native --name ..", "--name"),
        (f"zero --config small.toml --init-from native --name {'x' * 300}", "--name"),
        ("zero --config small.toml --init-from native --threads 100000", "--threads"),
        ("zero --config small.toml --init-from native --threads 99999999999999999999", "--threads"),
        ("zero --config small.toml --init-from native --temperature 1e-300", "temperature"),
        ("zero --config small.toml --init-from native --optim.lr inf", "--optim.lr"),
        ("zero --config small.toml --init-from native --optim.lr nan", "--optim.lr"),
        ("zero --config small.toml --init-from native --optim.clip nan", "--optim.clip"),
        ("zero --config small.toml --init-from native --optim.weight-decay inf", "--optim.weight-decay"),
        ("zero --config small.toml --init-from native --steps true", "--steps"),
        ("zero --config small.toml --init-from native --steps 1e3", "--steps"),
        ("zero --config small.toml --init-from native --max-tokens 5000", "max_tokens"),
        ("zero --config small.toml --init-from native --loss typo", "typo"),
        ("zero --config small.toml --init-from native --loss nomodule:f", "nomodule"),
        ("zero --config small.toml --init-from native --rewards.typo 1", "typo"),
        ("zero --config small.toml --init-from native --rewards.accuracy nan", "accuracy"),
        ("zero --config small.toml --init-from native --problems", "problems"),
        ("zero --config small.toml --init-from native --problems nofile.jsonl", "nofile.jsonl"),
        ("zero --config small.toml --init-from native --problems generator:nope", "nope"),
        ("zero --config small.toml --init-from native --problems hub:x", "hub:x"),
        ("zero --config small.toml --init-from native --problems .", "."),
        ("zero --config small.toml --init-from native --template nope", "nope"),
        ("zero --config small.toml --init-from native --device cuda", "cuda"),
        ("zero --config small.toml --init-from native --rollout.engine vllm", "vllm"),
        ("zero --config small.toml --init-from native --rollout.local.cache-gib 1e-9", "cache_gib"),
        ("zero --config small.toml --init-from native --rollout.local.cache-gib 1e300", "cache_gib"),
        ("zero --config sums.jsonl --init-from native", "sums.jsonl"),
        ("zero --config . --init-from native", "."),
        ("zero --config small.toml --config sample.toml", "config"),
        ("zero", "--config"),
        ("sft --config empty.toml --init-from native", "nothing to train on"),
        ("sft --config empty.toml --init-from native --curated 3 --epochs 0", "epochs"),
        ("sft --config empty.toml --init-from native --curated 3 --max-length 4", "max_length"),
        ("sft --config empty.toml --init-from native --samples-from zero --curated 1", "zero"),
        ("pretrain --config empty.toml --steps 0", "steps"),
        ("pretrain --config empty.toml --task nope", "nope"),
        ("pretrain --config empty.toml --vocab-size 3", "vocab_size"),
        ("reject --config sample.toml --init-from native --keep 0", "keep"),
        ("distill --config teach.toml --corpus nofile.jsonl --init-from dense", "nofile.jsonl"),
        ("distill --config teach.toml --corpus corpus.jsonl --init-from dense --epochs 0", "epochs"),
        ("distill --config teach.toml --corpus corpus.jsonl --tokenizer-from nowhere", "nowhere"),
        ("distill --config teach.toml --corpus corpus.jsonl --init-from dense --lora-rank 100000", "lora"),
        ("eval --config empty.toml --models native", "native"),
        ("eval --config empty.toml --models ..=native", ".."),
        ("eval --config empty.toml --models m=native --benchmarks ../x=sums.jsonl", "../x"),
        ("eval --config empty.toml --models m=native m=dense --benchmarks s=sums.jsonl", "m"),
        ("eval --config empty.toml --models m=native --benchmarks nope", "nope"),
        ("report --config empty.toml", "runs/tiny"),
        ("report --config empty.toml --transcripts x", "--transcripts"),
        ("evaluate --model native --benchmark nope --out scores", "nope"),
        ("evaluate --model native --benchmark math500 --out scores", "R1_DATA"),
        ("evaluate --model native --benchmark sums.jsonl --out sums.jsonl", "sums.jsonl"),
        ("evaluate --model native --benchmark sums.jsonl --out sums.jsonl/x", "sums.jsonl"),
        ("evaluate --model native --benchmark sums.jsonl --out s --data nowhere", "nowhere"),
        ("evaluate --model native --benchmark sums.jsonl --out s --limit 0", "limit"),
        ("evaluate --model native --benchmark sums.jsonl", "--out"),
        ("evaluate --model dense --benchmark sums.jsonl --out s --engine native", "native"),
        ("evaluate --model native --benchmark sums.jsonl --out s --template nope", "nope"),
        ("evaluate --model native --benchmark sums.jsonl --out s --device cuda", "cuda"),
        ("generate --model native --prompts nofile.jsonl --out o.jsonl", "nofile.jsonl"),
        ("generate --model native --prompts . --out o.jsonl", "."),
        ("generate --model native --prompts ids.jsonl --out .", "."),
        ("generate --model native --prompts ids.jsonl --out sums.jsonl/x", "sums.jsonl"),
        ("generate --model native --prompts ids.jsonl --out ids.jsonl", "ids.jsonl"),
        ("generate --model native --prompts ids.jsonl --out o.jsonl --temperature -1", "temperature"),
        ("generate --model native --prompts ids.jsonl --out o.jsonl --temperature nan", "temperature"),
        ("generate --model native --prompts ids.jsonl --out o.jsonl --top-p 0", "top_p"),
        ("generate --model native --prompts ids.jsonl --out o.jsonl --seed -1", "seed"),
        ("generate --model native --prompts ids.jsonl --out o.jsonl --dtype float8", "--dtype"),
        ("generate --model native --prompts ids.jsonl --out o.jsonl --engine vllm", "vllm"),
        ("generate --model native --prompts ids.jsonl --out o.jsonl --threads 1000000", "--threads"),
        ("generate --prompts ids.jsonl --out o.jsonl", "--model"),
        ("grade", "--source"),
        ("grade nofile.jsonl o.jsonl", "nofile.jsonl"),
        ("grade . o.jsonl", "."),
        ("grade sums.jsonl .", "."),
        ("grade sums.jsonl sums.jsonl/x", "sums.jsonl"),
        ("grade sums.jsonl sums.jsonl", "sums.jsonl"),
        ("grade sums.jsonl o.jsonl --kind poetry", "--kind"),
        ("grade sums.jsonl o.jsonl --mode loose", "--mode"),
        ("grade sums.jsonl o.jsonl extra", "extra"),
        ("chat --model native --temperature x", "--temperature"),
        ("chat", "--model"),
        ("serve --model native --port 70000", "port"),
        ("serve --model native --host nowhere.invalid", "nowhere.invalid"),
        ("serve --model native --host 999.999.999.999", "999"),
        ("up", "STAGE"),
        ("up nope", "nope"),
        ("up zero --preset nope", "nope"),
        ("up zero --jobs 0", "jobs"),
        ("up zero --typo 3", "--typo"),
        ("up zero --name a/b", "name"),
        ("up zero --seed x", "--seed"),
        ("up zero --steps x", "--steps"),
        ("up zero --loss typo", "typo"),
        ("up zero --device cuda", "cuda"),
        ("up zero --runs sums.jsonl", "sums.jsonl"),
        ("upp zero", "upp"),
        ("--typo", "--typo"),
        ("", "unknown stage"),
    ],
)
def test_what_is_typed_wrong_is_named(here, run, line, says):
    code, text = run(line)
    assert code == USER_ERROR, (code, text)
    assert says in text or says.replace("--", "").replace("-", "_") in text, text
