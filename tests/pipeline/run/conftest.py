"""The toy's run directory."""

from __future__ import annotations

import pytest
from toy import COMMAND, TOY, ToySettings

from pipeline.run.directory import open_run


@pytest.fixture
def opened(tmp_path):
    """Open the toy's directory with some settings."""

    def run(stage=TOY, **settings):
        return open_run(stage, ToySettings(runs=tmp_path, **settings), COMMAND)

    return run
