"""No stage and no command shows a setting that it ignores: each is read while it runs at micro size."""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import io
import json
import socket
import sys
import threading
import urllib.request
from fnmatch import fnmatch
from pathlib import Path
from types import FrameType
from typing import Any

import pydantic
import pytest
import uvicorn

from pipeline.__main__ import main
from pipeline.arguments import defaults, fields_of
from pipeline.data.corpus import Row
from pipeline.settings.common import to_dict
from pipeline.settings.evaluate import EvaluateSettings
from pipeline.settings.supervised import SftSettings
from pipeline.settings.tools import GenerateSettings
from pipeline.stages import smollm2
from pipeline.table import COMMANDS, STAGES
from rollout.ranges import Settings
from rollout.types import SamplingParams
from tests.conftest import ROOT
from tests.layout import PACKAGES
from tests.pipeline.evaluation.made_up import evaluation
from tests.small import llama, random_policy

CHECKS = {"rollout.ranges", "pipeline.arguments"}
"""Modules that look at every setting, whatever it is for."""
RECORDS = {"__post_init__", "to_dict", "inputs_of", "model_card", "finish"}
"""Functions that check settings or write them down."""


class Reads:
    """Settings that the product's code reads, by instance."""

    def __init__(self) -> None:
        self.of: dict[int, tuple[Settings, set[str]]] = {}

    def note(self, instance: Settings, name: str, frame: FrameType) -> None:
        """Note that `frame` asks `instance` for `name`."""
        module, code = frame.f_globals.get("__name__", ""), frame.f_code
        if module.partition(".")[0] not in PACKAGES or module in CHECKS or code.co_filename == "<string>":
            return
        if RECORDS & set(code.co_qualname.split(".")):
            return
        if name == "__dict__" and code.co_name == "params":  # all that sampling parameters have
            names = {field.name for field in dataclasses.fields(SamplingParams)}
        else:
            names = {name}
        self.of.setdefault(id(instance), (instance, set()))[1].update(names)

    def names(self, settings: type) -> set[str]:
        """Dotted names that were read of any instance of `settings`, groups included."""
        found = set[str]()

        def walk(instance: Any, prefix: str) -> None:
            _, read = self.of.get(id(instance), (instance, set()))
            for field in dataclasses.fields(instance):
                value = object.__getattribute__(instance, field.name)
                if dataclasses.is_dataclass(value):
                    walk(value, f"{prefix}{field.name}.")
                elif field.name in read:
                    found.add(prefix + field.name)

        for instance, _ in self.instances(settings):
            walk(instance, "")
        return found

    def passed_on(self, source: type, target: type) -> set[str]:
        """Settings of `source` that were read of a `target` with the same value, which is not its default."""
        usual = {field.name: field.default for field in dataclasses.fields(target)}
        found = set[str]()
        for one, _ in self.instances(source):
            for two, read in self.instances(target):
                values = {name: object.__getattribute__(two, name) for name in read & usual.keys()}
                mine = {field.name for field in dataclasses.fields(one)}
                found |= {
                    name
                    for name, value in values.items()
                    if name in mine and object.__getattribute__(one, name) == value != usual[name]
                }
        return found

    def instances(self, settings: type) -> list[tuple[Settings, set[str]]]:
        """Those of which anything was read."""
        return [pair for pair in self.of.values() if type(pair[0]) is settings]


@pytest.fixture
def reads(monkeypatch):
    seen = Reads()

    def read(self, name):
        seen.note(self, name, sys._getframe(1))
        return object.__getattribute__(self, name)

    monkeypatch.setattr(Settings, "__getattribute__", read, raising=False)
    return seen


def settings_of(entry: Any) -> set[str]:
    """Every setting of a stage or command, by its dotted name."""
    return {name for name, _ in fields_of(entry.settings)}


# ---- settings of engines that these runs do not open, and of a guard without divergence: who reads them

ELSEWHERE = {
    "rollout.vllm.*": "rollout/vllm",
    "vllm.*": "rollout/vllm",
    "rollout.endpoint.*": "rollout/endpoint",
    "endpoint.*": "rollout/endpoint",
    "rollout.address": "rollout/pool",
    "rollout.dtype": "rollout/pool",
    "rollout.timeout_s": "rollout/pool",
    "rollout.worker_*": "rollout/pool",
    "guard.*": "pipeline/run",
    "workers": "rollout/pool",
}


def read_in(folder: str, name: str) -> bool:
    """Whether a file of `folder` has `settings.NAME` or `vllm.NAME`."""
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in (ROOT / folder).glob("*.py")]
    nodes = (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return any(node.attr == name and ast.unparse(node.value).endswith(("settings", "vllm")) for node in nodes)


def unread(entry: Any, reads: Reads) -> set[str]:
    """Settings that nothing read."""
    names = settings_of(entry) - reads.names(entry.settings)
    if entry.name == "eval":
        names -= reads.passed_on(entry.settings, EvaluateSettings)
    found = {name: folder for name in names for like, folder in ELSEWHERE.items() if fnmatch(name, like)}
    return {name for name in names if name not in found or not read_in(found[name], name.rpartition(".")[2])}


# ---- stages

EXTENDS = "resume"
"""A stage that extends its directory goes on without it. `up` gives it to every stage that another needs."""
FLAGS = {
    "pretrain": "--threads 1 --steps 2 --pool 20 --checkpoint-every 1 --optim.warmup-steps 0"
    " --stop.loss 9 --stop.every 1 --stop.documents 2 --optim.decay-steps 1",
    "zero": "--threads 1 --init-from {policy} --steps 2 --pool 8 --prompts-per-step 2 --eval-problems 2"
    " --problems generator:sum {data}/aime24.jsonl",
    "student": "--threads 1 --tokenizer-from {policy} --steps 2 --pool 20 --checkpoint-every 1"
    " --optim.warmup-steps 0",
    "sft": "--threads 1 --init-from {policy} --curated 10 --samples-from= --epochs 1",
    "reject": "--threads 1 --init-from {policy} --pool 4 --samples 2 --problems {data}/aime24.jsonl",
    "smollm2": "--threads 1 --gguf {policy}/config.json",
    "distill": "--threads 1 --corpus {corpus} --init-from {dense} --steps 1 --optim.lr 1e-3",
    "on_policy": "--threads 1 --init-from {dense} --teacher {policy} --steps 2 --pool 8 --divergence jsd"
    " --prompts-per-step 2 --minibatches 1 --eval-problems 2 --problems generator:sum {data}/aime24.jsonl",
    "eval": "--threads 1 --models a={policy} --heldout-count 2 --extra-benchmarks {data}/aime24.jsonl"
    " --data {data} --seed 3 --engine native --dtype bfloat16 --template r1 --samples 2 --max-batch 3"
    " --max-tokens 5 --temperature 0.5 --top-p 0.9 --top-k 7 --allow-unsafe-code --max-error-share 0.9"
    " --shots 1 --shots-from {data}/gsm8k_train.jsonl --corpus {corpus} --save-every 2",
    "report": "",
}
"""The micro run of each stage's module."""
ONLY = {
    ("zero", "--environment python --steps 1"): ["max_turns"],
    ("zero", "--optim.schedule cosine --steps 1"): ["optim.min_lr_ratio"],
    ("on_policy", "--optim.schedule cosine --steps 1"): ["optim.min_lr_ratio"],
    ("sft", "--samples-from {samples}"): ["max_samples"],
    ("sft", "--corpus {corpus}"): ["count", "fields", "data"],
    ("distill", "--steps 0 --epochs 0.1"): ["epochs"],
}
"""Settings that are read only with other settings than those: here a second run that reads them."""


@pytest.fixture(scope="module")
def files(tokenizer, tmp_path_factory):
    """A policy, a corpus, samples of an RL stage, and a folder of benchmarks, by name."""
    folder = tmp_path_factory.mktemp("inputs")
    policy = random_policy(folder / "policy", tokenizer, "r1-zero-short", initializer_range=0.1)
    llama(vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    row = {"id": "a", "question": "1+1?", "completion": "<think>\n1+1=2\n</think>\n<answer>2</answer>"}
    row |= {"answer": "2", "language": "en", "kind": "math", "source": "made"}
    sample = row | {"text": row["completion"], "verdict": "correct", "parts": {"language": 1.0}}
    solved = {"id": "a", "problem": "1+1?", "answer": "2", "solution": "1+1=2\n#### 2"}
    for name, rows in {
        "corpus": [row],
        "samples": [sample],
        "data/aime24": [solved],
        "data/gsm8k_train": [solved | {"id": str(n), "problem": f"{n} red apples?"} for n in range(9)],
        "data/gsm8k_test": [solved],
        "data/math500": [solved],
    }.items():
        file = folder / f"{name}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "policy": policy,
        "dense": folder / "dense",
        "corpus": folder / "corpus.jsonl",
        "samples": folder / "samples.jsonl",
        "data": folder / "data",
        "scored": evaluation(folder / "scored", [[True], [False]]),
    }


@pytest.fixture
def go(files, tmp_path, monkeypatch, tokenizer):
    """Run a stage at micro size, with further flags, twice: the second time with --resume."""
    kept = Row("a", "1+1?", "<think>1+1=2</think><answer>2</answer>", "2", "en", "math", "made")
    monkeypatch.setattr("pipeline.stages.reject.keepers", lambda group, least: [kept])
    monkeypatch.setattr(smollm2, "read_model", lambda path: llama(vocab_size=len(tokenizer)))
    monkeypatch.setattr(smollm2, "read_tokenizer", lambda path: tokenizer)
    monkeypatch.setattr(smollm2, "answer", lambda *args: smollm2.EXPECTED)

    def run(name: str, more: str = "") -> None:
        preset = "smollm2" if name == "smollm2" else "micro"
        words = f"{name} --config {ROOT}/configs/{preset}/{name}.toml --runs {tmp_path} --name m"
        argv = f"{words} {FLAGS[name]} {more}".format(**files).split()
        assert main(argv) == main([*argv, "--resume"]) == 0

    return run


def test_every_stage_has_a_micro_run():
    assert {(TABLE[name].settings, TABLE[name].module) for name in FLAGS} == {
        (stage.settings, stage.module) for stage in STAGES
    }


TABLE = {entry.name: entry for entry in (*STAGES, *COMMANDS)}


@pytest.mark.parametrize("name", FLAGS)
def test_a_stage_reads_every_setting(reads, go, name):
    if name == "report":
        go("eval")
    go(name)
    others = {setting for (stage, _), settings in ONLY.items() if stage == name for setting in settings}
    others |= {EXTENDS} if TABLE[name].extends else set()
    assert unread(TABLE[name], reads) == others


@pytest.mark.parametrize(("name", "more"), ONLY)
def test_a_stage_reads_the_others_where_they_have_an_effect(reads, go, name, more):
    go(name, more)
    assert set(ONLY[name, more]) <= reads.names(TABLE[name].settings)


# ---- commands

MODEL = "--model {policy} --engine native --max-tokens 4"
COMMAND_LINES = {
    "up": "report --preset micro --runs {out}",
    "grade": "{corpus} {out}",
    "generate": MODEL + " --prompts {prompts} --out {out} --threads 1",
    "evaluate": MODEL + " --benchmark {data}/aime24.jsonl --limit 2 --max-batch 4 --out {out} --threads 1"
    " --samples 1 --shots 1 --shots-from {data}/gsm8k_train.jsonl --environment python",
    "compare": "{scored} {scored} --out {out}",
    "leaderboard": "{scored} --out {out} --json {out}",
    "replay": "{recorded} --step 1 --device cpu --loss dr_grpo",
    "doctor": "{samples} --model {policy}",
    "chat": MODEL + " --threads 1",
    "serve": MODEL + " --port 0 --threads 1 --api-key key",
}


def one_request(server: uvicorn.Server, sockets: list[socket.socket]) -> None:
    """Stands for `uvicorn.Server.run`, in a thread of its own."""
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets)))
    thread.start()
    url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}/v1/completions"
    request = urllib.request.Request(url, b'{"prompt": "1+1?"}', {"Authorization": "Bearer key"})
    with urllib.request.urlopen(request) as answer:
        assert json.load(answer)["usage"]["completion_tokens"] <= 4
    server.should_exit = True
    thread.join()


@pytest.mark.parametrize("name", [command.name for command in COMMANDS])
def test_a_command_reads_every_setting(reads, files, tmp_path, monkeypatch, name):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("pipeline.tools.up.make", lambda steps, jobs: None)
    monkeypatch.setattr("sys.stdin", io.StringIO("1+1?\n"))
    monkeypatch.setattr(uvicorn.Server, "run", one_request)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "1+1?"}\n')
    recorded = tmp_path / "micro/zero"
    if name == "replay":
        zero = f"--config configs/micro/zero.toml --runs {tmp_path} {FLAGS['zero']} --steps 1 --record 1"
        assert main(["zero", *zero.format(**files).split()]) == 0
    line = COMMAND_LINES[name].format(**files, prompts=prompts, out=tmp_path / "out", recorded=recorded)
    assert main([name, *line.split()]) == 0
    assert not unread(TABLE[name], reads)


# ---- what counts

GENERATE: dict[str, Any] = {"model": Path("m"), "prompts": Path("p"), "out": Path("o")}


def test_looking_at_all_settings_is_no_read(reads):
    settings = SftSettings(curated=1)
    defaults(SftSettings)
    to_dict(settings)
    pydantic.TypeAdapter(SftSettings).validate_python({"curated": 2, "optim": {"lr": 1.0}})
    assert dataclasses.replace(settings, curated=3) != settings and repr(settings)
    of_guard = {name for name in settings_of(TABLE["sft"]) if name.startswith("guard.")}
    assert reads.names(SftSettings) == set()
    assert unread(TABLE["sft"], reads) == settings_of(TABLE["sft"]) - of_guard


def test_sampling_parameters_are_reads(reads):
    GenerateSettings(**GENERATE).params()
    sampling = {"max_tokens", "temperature", "top_p", "top_k", "min_tokens", "stop", "ignore_eos"}
    assert sampling <= reads.names(GenerateSettings) <= sampling | {"seed"}


def test_a_setting_of_an_engine_that_no_file_reads_is_found():
    assert read_in("rollout/vllm", "self_test") and not read_in("rollout/vllm", "no_such_setting")
