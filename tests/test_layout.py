"""The layout holds: imports point one way, without a circle; files and folders are small, names unique."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from tests.layout import (
    MOST_LINES,
    PRODUCT,
    RULES,
    TESTS,
    files_are_small,
    folders_are_small,
    imports_form_no_circle,
    imports_point_one_way,
    names_are_unique,
    own_imports_stand_at_the_top,
    product_is_small,
    settings_are_light,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_product_keeps(rule):
    assert list(rule(PRODUCT)) == []


def test_the_tests_files_are_small():
    assert len(TESTS) > 80 and list(files_are_small(TESTS)) == []


def test_files_of_tests_have_different_names():
    """Of two with one name pytest collects the first alone, and fails."""
    names = Counter(path.rpartition("/")[2] for path in TESTS if "/test_" in path)
    assert [name for name, times in names.items() if times > 1] == []


# ---- each rule finds what breaks it

LATE = "def f():\n    from {} import x\n"
TYPES = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import {}\n"


@pytest.mark.parametrize(
    ("rule", "planted", "found"),
    [
        (imports_point_one_way, {"model/a.py": "import rollout.types"}, "model/a.py imports rollout.types"),
        (
            imports_point_one_way,
            {"model/a.py": "from transformers import X"},
            "model/a.py imports transformers",
        ),
        (imports_point_one_way, {"model/scale/a.py": "import triton"}, "model/scale/a.py imports triton"),
        (
            imports_point_one_way,
            {"rewards/a.py": "from rollout import engine"},
            "rewards/a.py imports rollout.engine",
        ),
        (imports_point_one_way, {"rewards/a.py": "import model"}, "rewards/a.py imports model"),
        (
            imports_point_one_way,
            {"rollout/a.py": LATE.format("pipeline.errors")},
            "rollout/a.py imports pipeline.errors",
        ),
        (
            imports_point_one_way,
            {"rollout/a.py": TYPES.format("rewards.pool")},
            "rollout/a.py imports rewards.pool",
        ),
        (
            imports_point_one_way,
            {"pipeline/a.py": "from distill import student"},
            "pipeline/a.py imports distill.student",
        ),
        (
            imports_point_one_way,
            {"rollout/types.py": "from .sampling import f"},
            "rollout/types.py imports rollout.sampling",
        ),
        (imports_point_one_way, {"rollout/types.py": "import torch"}, "rollout/types.py imports torch"),
        (
            imports_point_one_way,
            {"rollout/pool/a.py": "from ..open import f"},
            "rollout/pool/a.py imports rollout.open",
        ),
        (
            imports_point_one_way,
            {"rollout/dense/a.py": LATE.format("vllm")},
            "rollout/dense/a.py imports vllm",
        ),
        (
            imports_point_one_way,
            {"pipeline/settings/a.py": "import tyro"},
            "pipeline/settings/a.py imports tyro",
        ),
        (
            settings_are_light,
            {"pipeline/settings/a.py": "import pydantic"},
            "settings import, imports pydantic",
        ),
        (
            settings_are_light,
            {"pipeline/settings/a.py": "import pipeline.errors"},
            "a.py imports pipeline.errors",
        ),
        (
            settings_are_light,
            {"pipeline/settings/a.py": "from rollout import local"},
            "a.py imports rollout.local",
        ),
        (settings_are_light, {"rewards/maths/spans.py": "import torch"}, "rewards/maths/spans.py, which"),
        (
            settings_are_light,
            {"rollout/text/__init__.py": "import jinja2"},
            "rollout/text/__init__.py, which",
        ),
        (
            imports_form_no_circle,
            {"model/a.py": "import model.b", "model/b.py": "import model.a"},
            "model/a.py",
        ),
        (
            imports_form_no_circle,
            {"model/a.py": "import model.b", "model/b.py": LATE.format("model.a")},
            "model/b.py",
        ),
        (
            imports_form_no_circle,
            {
                "model/c/__init__.py": "from .d import x",
                "model/c/d.py": "from ..e import y",
                "model/e.py": "import model.c",
            },
            "model/c/d.py",
        ),
        (
            own_imports_stand_at_the_top,
            {"model/a.py": LATE.format("model")},
            "model/a.py imports model inside",
        ),
        (
            own_imports_stand_at_the_top,
            {"model/a.py": "class A:\n    async def f(self):\n        import model.moe"},
            "model.moe",
        ),
        (
            own_imports_stand_at_the_top,
            {"distill/a.py": "def f():\n    import_module('pipeline.errors')"},
            "pipeline.errors",
        ),
        (
            own_imports_stand_at_the_top,
            {"model/kernels/fp8/gemm.py": LATE.format("model.moe")},
            "gemm.py imports model.moe",
        ),
        (folders_are_small, {f"model/new/{n}.py": "" for n in range(13)}, "model/new/ has 13 files"),
        (files_are_small, {"model/a.py": "x = 1\n" * 401}, "model/a.py has 401 lines"),
        (
            names_are_unique,
            {"model/a.py": "def moe(): 1", "model/b/c.py": "class moe: x = 1"},
            "model/a.py and model/b/c.py",
        ),
        (names_are_unique, {"model/a.py": "async def g(): 1", "model/b.py": "def g(): 1"}, "g is defined"),
        (product_is_small, {f"model/{n}.py": "x = 1\n" * 400 for n in range(60)}, f"at most {MOST_LINES}"),
    ],
)
def test_a_rule_finds_what_is_planted(rule, planted, found):
    new = set(rule(PRODUCT | planted)) - set(rule(PRODUCT))
    assert any(found in line for line in new), new


@pytest.mark.parametrize(
    "planted",
    [
        {"model/kernels/a.py": "import triton, torch"},
        {"model/dense.py": "import transformers"},
        {"rollout/vllm/a.py": LATE.format("vllm")},
        {"rewards/a.py": "from rollout.types import Problem"},
        {"pipeline/settings/a.py": "from rewards.reward import x\nfrom . import common"},
        {"pipeline/settings/a.py": TYPES.format("torch")},
        {"model/a.py": TYPES.format("model.b"), "model/b.py": "import model.a"},
        {"model/kernels/fp8/gemm.py": LATE.format("model.kernels.fp8.cuda")},
        {"model/new/__init__.py": "", **{f"model/new/{n}.py": "" for n in range(12)}},
        {"model/a.py": "x = 1\n" * 400},
        {
            "model/a.py": "def run(): 1\ndef main(): 1\ndef _f(): 1",
            "model/b.py": "def run(): 1\ndef main(): 1\ndef _f(): 1",
        },
        {"model/a.py": "def here(): 1", "distill/a.py": "def here(): 1"},
        {"model/a.py": "def f():\n    def inner(): 1", "model/b.py": "def inner(): 1"},
    ],
)
def test_no_rule_finds_what_is_right(planted):
    sources = {path: text for path, text in PRODUCT.items() if not re.fullmatch(r"model/\w+\.py", path)}
    for rule in RULES:
        assert set(rule(sources | planted)) <= set(rule(sources))
