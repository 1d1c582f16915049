"""`--inject`: each fault is named by the run within two steps, and by `doctor` from its folder."""

from __future__ import annotations

import json

import pytest
import torch

from pipeline.__main__ import main
from pipeline.data.problems import problems
from pipeline.settings.common import OptimSettings
from pipeline.train.learner import Learner
from pipeline.train.pack import pack_supervised
from pipeline.train.policy import load_policy, save_policy
from rollout.text.tokenizer import encode_example
from rollout.types import Problem
from tests.small import random_policy

UPDATES = 60
CAUSES = {
    "stale": "stale_weights", "fp8": "precision", "route": "routes", "template": "template", "eos": "eos",
}  # fmt: skip


def odd(problem: Problem, completion: str) -> float:
    """A reward with spread."""
    return float(sum(map(ord, completion)) % 2)


@pytest.fixture(scope="module")
def policy(tokenizer, tmp_path_factory):
    """One that has learned to answer sums in the template: before that no prompt matters to it."""
    start = random_policy(
        tmp_path_factory.mktemp("start"), tokenizer, "r1-zero-short", initializer_range=0.05
    )
    net, _ = load_policy(start, torch.device("cpu"))
    learner = Learner(net, OptimSettings(lr=3e-3), UPDATES)
    asked = problems("generator:sum", count=24, seed=0)
    texts = [
        encode_example(tokenizer, p.question, "r1-zero-short", f" <answer> {p.answer} </answer>")
        for p in asked
    ]
    rows = [([*prompt, *done], [False] * len(prompt) + [True] * len(done)) for prompt, done in texts]
    for _ in range(UPDATES):
        learner.supervised_update(pack_supervised(rows, 2_000))
    path = tmp_path_factory.mktemp("policy") / "model"
    save_policy(net, tokenizer, path, "r1-zero-short", "learned sums")
    return path


@pytest.fixture
def zero(policy, tmp_path):
    """`zero(*flags)`: exit code and folder of a run of two steps."""

    def run(*flags):
        settings = {
            "init-from": policy, "template": "r1-zero-short", "problems": "generator:sum", "pool": 24,
            "eval-every": 0, "steps": 2, "prompts-per-step": 12, "group-size": 8, "max-tokens": 24, "kl-coef": 0,
            "threads": 1, "optim.lr": 1e-3, "max-mismatch-kl": 9, "runs": tmp_path, "name": "x",
        }  # fmt: skip
        given = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
        (tmp_path / "zero.toml").write_text(f'[rewards]\n"{odd.__module__}:odd" = 1.0\n')
        code = main(["zero", "--config", str(tmp_path / "zero.toml"), *given, *map(str, flags)])
        return code, tmp_path / "x" / "zero"

    return run


@pytest.mark.parametrize("fault", CAUSES)
def test_the_cause_is_named_within_two_steps_and_from_the_folder(zero, capsys, fault):
    for seed in (0, 1):
        code, run = zero("--inject", fault, "--seed", seed, "--name", f"x{seed}")
        run = run.parent.parent / f"x{seed}" / "zero"
        out = capsys.readouterr().out
        import sys

        sys.stderr.write(out)
        sys.stderr.write((run / "metrics.jsonl").read_text())
        assert code == 0 and "FAULTY ON PURPOSE" in out
        assert f": {CAUSES[fault]}: " in out, "the console"
        assert main(["doctor", str(run)]) == 0
        found = json.loads(capsys.readouterr().out.splitlines()[-1])["findings"]
        assert [each["kind"] for each in found if each["kind"] in CAUSES.values()] == [CAUSES[fault]]
        assert f"with a fault on purpose: {fault}" in (run / "model" / "README.md").read_text()
