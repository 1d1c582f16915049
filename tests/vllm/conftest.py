"""Tests of the real vLLM engine, by `make test-vllm` in an environment of its own; elsewhere skipped."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

MISSING = "vLLM is not installed in this environment: run `make test-vllm`, which has its own"


def pytest_collection_modifyitems(items):
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            if item.path.is_relative_to(Path(__file__).parent):  # the hook is shown every test there is
                item.add_marker(pytest.mark.skip(reason=MISSING))
