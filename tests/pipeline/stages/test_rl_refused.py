"""What an RL stage refuses before it samples: one line, exit code 2, and no directory is left in use."""

from __future__ import annotations

import pytest

from pipeline.__main__ import main
from tests.small import random_policy


@pytest.fixture(scope="module")
def policy(tokenizer, tmp_path_factory):
    return random_policy(tmp_path_factory.mktemp("policy"), tokenizer, "r1-zero-short")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--device", "cuda"], "--device cuda: torch finds no GPU here"),
        (["--problems"], "problems must name at least one source"),
        (["--loss", "dap"], "did you mean dapo?"),
        (["--loss", "os:getcwd"], "is not f(tokens"),
        (["--optim.balance-alpha", "1e-4", "--init-from", "nowhere"], "no model at nowhere"),
        (["--seed", str(2**63)], "must be in [0, "),
        (["--runs", "README.md"], "choose another --runs"),
    ],
)
def test_what_cannot_run_is_refused_before_the_first_step(policy, tmp_path, flags, says, capsys):
    line = ["zero", "--config", "configs/micro/zero.toml", "--runs", str(tmp_path), "--threads", "1"]
    assert main([*line, "--init-from", str(policy), *flags]) == 2
    said = capsys.readouterr()
    assert says in said.err and said.err.count("\n") == 1 and "zero" not in said.out
    assert not (tmp_path / "micro/zero").exists()
