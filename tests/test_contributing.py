"""The code in CONTRIBUTING.md is complete: it is typed in as shown, in the files that it names, and run.

A user's own reward and loss are files of the working directory, outside the packages. Engine, stage and
benchmark are typed into a copy of the project.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.small import random_policy

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(python|toml)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
FILES = {code.partition("\n")[0].removeprefix("# "): code for _, code in BLOCKS if code.startswith("# ")}
EDITS = {  # part of a block -> what stands before the lines in the file
    "in ENGINES": "ENGINES: dict[str, Callable[..., RolloutEngine]] = {\n",
    "in STAGES": "STAGES = (\n",
    "in BENCHMARKS": "BENCHMARKS = {\n",
}


@pytest.fixture(scope="module")
def policy(tokenizer, tmp_path_factory):
    return random_policy(tmp_path_factory.mktemp("policy"), tokenizer, "r1-zero-short", initializer_range=0.1)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project with every block of CONTRIBUTING.md typed in."""
    copy = tmp_path_factory.mktemp("project")
    for folder in ("model", "rollout", "rewards", "pipeline", "distill", "configs", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for code in FILES.values():
        parts = re.split(r"^# (\S+\.(?:py|toml))(?:: (.+))?\n", code, flags=re.MULTILINE)[1:]
        for name, where, lines in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
            file = copy / name
            if where is None:
                file.parent.mkdir(exist_ok=True)
                assert not file.exists(), f"{name} is there already"
                file.write_text(lines)
            elif where == "beside the other imports":
                first = re.search(r"^(?:from|import) ", file.read_text(encoding="utf-8"), re.MULTILINE)
                text = file.read_text(encoding="utf-8")
                file.write_text(text[: first.start()] + lines + text[first.start() :], encoding="utf-8")
            elif where != "in STAGES":
                insert(file, EDITS[where], lines, after=True)
            else:  # a row stands after those that it needs
                insert(file, ")\n\nCOMMANDS = (", lines, after=False)
    (copy / "rollout/plain/__init__.py").touch()
    insert(copy / "rollout/settings.py", 'EngineName = Literal["auto", ', '"plain", ', after=True)
    return copy


def insert(file, mark, lines, after):
    """Type `lines` into `file` before or after `mark`."""
    text = file.read_text(encoding="utf-8")
    assert text.count(mark) == 1, f"{file.name}: {mark!r}"
    file.write_text(text.replace(mark, mark + lines if after else lines + mark), encoding="utf-8")


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(project, *args):
    """`python ARGS` in the copy."""
    done = subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=project,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


ZERO = ("--threads", 1, "--steps", 2, "--eval-every", 0, "--runs", "runs")


def test_every_block_has_its_place():
    toml = [code for language, code in BLOCKS if language == "toml"]
    assert [tomllib.loads(code) for code in toml] and len(FILES) == 11
    for name in FILES:
        file = name.partition(":")[0]
        assert (ROOT / file).exists() == (":" in name), name


def test_a_reward_and_a_loss_of_your_own_are_one_file_each(policy, tmp_path, cli):
    """Part, metric, glossary line and console of the reward; the loss computes what it shows."""
    for name in ("my_rewards.py", "my_losses.py"):
        (tmp_path / name).write_text(FILES[name])
    table = next(code for language, code in BLOCKS if language == "toml" and code.startswith("[rewards]"))
    config = (ROOT / "configs/micro/zero.toml").read_text()
    shown = re.sub(r"^\[rewards\]\n(?:.+\n)*", table, config, flags=re.MULTILINE)
    assert tomllib.loads(shown)["rewards"] == tomllib.loads(table)["rewards"]
    (tmp_path / "zero.toml").write_text(shown)
    own = ("--init-from", policy, "--loss", "my_losses:reinforce", "--minibatches", 2)
    done = cli("zero", "--config", "zero.toml", *own, *ZERO, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    stage = tmp_path / "runs/micro/zero"
    line = FILES["my_rewards.py"].split('"""')[1]
    assert json.loads((stage / "glossary.json").read_text()) == {
        "reward/brief": line,
        "loss/capped": "a metric of the loss my_losses:reinforce",
    }
    for row in lines(stage / "samples.jsonl"):
        brief = min(1.0, max(0.0, (400 - len(row["text"])) / 360))
        assert row["parts"]["brief"] == pytest.approx(brief)
        total = row["parts"]["accuracy"] + 0.2 * row["parts"]["format"] + 0.5 * brief
        assert row["reward"] == pytest.approx(total, abs=1e-6)
    metrics = lines(stage / "metrics.jsonl")
    assert len(metrics) == 2 and "brief 0." in done.stdout
    for row in metrics:
        assert 0 < row["reward/brief"] < 1 and row["optim/grad_norm"] > 0 and 0 <= row["loss/capped"] <= 1
        assert "loss/kl_ref" not in row  # a part of grpo's metrics, not of this loss's


def test_an_environment_of_your_own_is_one_file(policy, tmp_path, cli):
    """A wrong answer is followed by the remark; the second is graded."""
    (tmp_path / "my_environments.py").write_text(FILES["my_environments.py"])
    config = ROOT / "configs/micro/zero.toml"
    own = ("--init-from", policy, "--environment", "my_environments:second_try", "--max-tokens", 48)
    done = cli("zero", "--config", config, *own, *ZERO, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [row for row in lines(tmp_path / "runs/micro/zero/samples.jsonl") if "turns" in row]
    assert rows, "a random policy ends a turn now and then, and is wrong"
    assert all([who for who, _ in row["turns"]][:3] == ["model", "environment", "model"] for row in rows)
    assert all(len(row["turns"]) == 3 and "Check it." in row["turns"][1][1] for row in rows)
    assert not any("Check it." in row["text"] for row in rows)


def test_the_engine_of_the_guide_samples_what_the_native_one_does(project, policy, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "User: 3+4=?"}\n{"prompt": "Hello"}\n')
    found = {}
    for engine in ("plain", "native"):
        out = tmp_path / f"{engine}.jsonl"
        options = ("--samples", 2, "--max-tokens", 8, "--threads", 1, "--engine", engine)
        run(
            project,
            "-m",
            "pipeline",
            "generate",
            "--model",
            policy,
            "--prompts",
            prompts,
            "--out",
            out,
            *options,
        )
        found[engine] = lines(out)
    assert len(found["plain"]) == 4
    for one, two in zip(found["plain"], found["native"], strict=True):
        assert one["token_ids"] == two["token_ids"] and one["finish_reason"] == two["finish_reason"]
        assert one["logprobs"] == pytest.approx(two["logprobs"], abs=1e-5)


def test_the_stage_of_the_guide_runs_on_what_another_engine_sampled(project, policy):
    engine = ("--rollout.engine", "plain", "--steps", 1)
    run(
        project,
        "-m",
        "pipeline",
        "zero",
        "--config",
        "configs/micro/zero.toml",
        "--init-from",
        policy,
        *ZERO,
        *engine,
    )
    metrics = lines(project / "runs/micro/zero/metrics.jsonl")
    assert metrics[0]["policy/mismatch_kl"] < 1e-9
    printed = run(project, "-m", "pipeline", "words", "--config", "configs/micro/words.toml")
    words = json.loads((project / "runs/micro/words/words.json").read_text())
    assert (
        "words: " in printed and len(words) == 5 and sorted(words.values(), reverse=True) == [*words.values()]
    )
    assert (project / "runs/micro/words/done.json").is_file()
    assert "count the words of R1-Zero" in run(project, "-m", "pipeline", "--help")


def test_the_benchmarks_of_the_guide_are_found(project):
    code = "from pipeline.data.problems import BENCHMARKS; print(BENCHMARKS['aime26'].path)"
    assert run(project, "-c", code).strip() == "math-ai/aime26"
    code = "from tests.bench import __main__ as b, packing; c = packing.run()['claims']"
    code += "; print(b.holds(c[0]), 'packing' in b.names())"
    assert run(project, "-c", code).split() == ["True", "True"]
