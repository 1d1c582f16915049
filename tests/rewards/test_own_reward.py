"""A user's own reward, from a file outside the package: TOML, samples, metrics, console, report."""

from __future__ import annotations

import json

import pytest

from tests.small import random_policy

OWN = '''
def brevity(problem, completion):
    """mean of 1 / (1 + characters)"""
    return 1 / (1 + len(completion))


def picky(problem, completion, rollout):
    """mean of 1 where the sample's number is even"""
    if rollout.sample % 2:
        raise LookupError("no verdict on odd samples")
    return 1.0
'''
GLOSSARY = {
    "reward/brevity": "mean of 1 / (1 + characters)",
    "reward/picky": "mean of 1 where the sample's number is even",
}


@pytest.fixture(scope="module")
def policy(tokenizer, tmp_path_factory):
    return random_policy(tmp_path_factory.mktemp("policy"), tokenizer, "r1-zero-short", initializer_range=0.1)


@pytest.fixture
def zero(policy, root, tmp_path, cli):
    """`zero(**weights)`: two steps of the micro stage with these rewards of one's own, in `tmp_path`."""
    (tmp_path / "my_rewards.py").write_text(OWN)

    def run(**weights):
        own = "".join(f'"my_rewards:{name}" = {weight}\n' for name, weight in weights.items())
        config = (root / "configs/micro/zero.toml").read_text().replace("[rewards]\n", f"[rewards]\n{own}")
        (tmp_path / "zero.toml").write_text(config)
        settings = ["--threads", 1, "--init-from", policy, "--steps", 2, "--eval-every", 0, "--runs", "runs"]
        return cli("zero", "--config", "zero.toml", *settings, cwd=tmp_path)

    return run


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_it_appears_by_itself_in_samples_metrics_console_and_report(zero, tmp_path, cli):
    done = zero(brevity=0.5, picky=0.25)
    assert done.returncode == 0, done.stderr
    stage = tmp_path / "runs/micro/zero"
    assert json.loads((stage / "glossary.json").read_text()) == GLOSSARY
    for row in lines(stage / "samples.jsonl"):
        assert row["parts"]["brevity"] == 1 / (1 + len(row["text"]))
        failed = "picky" not in row["parts"]
        assert (row["verdict"] == "error") == failed == (row["advantage"] is None)
        if not failed:
            weights = {"accuracy": 1.0, "format": 0.2, "language": 0.2, "brevity": 0.5, "picky": 0.25}
            total = sum(weights.get(name, 0.0) * value for name, value in row["parts"].items())
            assert row["reward"] == pytest.approx(total, abs=1e-6)
    metrics = lines(stage / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2]
    for row in metrics:
        assert 0 < row["reward/brevity"] < 1 and row["reward/picky"] == 1
        assert row["reward/errors"] == 16  # of 8 groups of 4
    assert "brevity 0." in done.stdout and "picky 1" in done.stdout
    config = (stage / "config.toml").read_text()
    assert '"my_rewards:brevity" = 0.5' in config

    scores = tmp_path / "runs/micro/eval/scores.json"
    scores.parent.mkdir()
    scores.write_text(json.dumps({"scores": {}, "models": {}, "not_made": {}, "not_scored": {}}))
    reported = cli("report", "--config", "configs/micro/report.toml", "--runs", tmp_path / "runs")
    assert reported.returncode == 0, reported.stderr
    page = (tmp_path / "runs/micro/report.html").read_text(encoding="utf-8")
    for name, line in GLOSSARY.items():
        assert name in page and line.replace("'", "&#39;") in page


def test_a_wrong_name_is_one_line_and_leaves_no_directory(zero, tmp_path):
    done = zero(brevty=0.5)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "did you mean my_rewards:brevity?" in done.stderr
    assert not (tmp_path / "runs").exists()
