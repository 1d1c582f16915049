"""The made-up run as a fixture."""

from __future__ import annotations

import pytest
from made_up_run import CHAIN, make_run


@pytest.fixture
def fake_run(tmp_path):
    """`fake_run(stages=...)`: the folder of a run in which those stages, all by default, have been made."""
    return lambda stages=(*CHAIN, "eval"), n=320: make_run(tmp_path / "runs" / "fake", stages, n)
