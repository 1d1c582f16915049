"""Problem sets: every shape of row, every error with its place, near copies, resumable order."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest

from pipeline.data.problems import BENCHMARKS, FILES, order, problems
from pipeline.errors import UserError
from pipeline.settings.common import RowSettings
from rollout.types import Problem, StdioTest
from tests.data import FOLDER as SHARED

STRICT = RowSettings(max_bad_rows=0)
needs_data = pytest.mark.skipif(
    not (SHARED / "math500.jsonl").is_file(),
    reason="no benchmark files: set R1_DATA to a folder that has them",
)


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch):
    monkeypatch.delenv("R1_DATA", raising=False)


def write(path: Path, *rows: object) -> str:
    path.write_text(
        "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8"
    )
    return str(path)


def question(text: str, kind: str = "math") -> Problem:
    return Problem(id=text, kind=kind, question=text, answer="1")


# ---- local files


def test_a_row_becomes_a_problem_whatever_its_keys_are_called(tmp_path):
    file = write(
        tmp_path / "mine.jsonl",
        {"id": "a", "problem": "1+1?", "answer": 2, "language": "zh", "source": "school"},
        {"question": "2+2?", "solution": "so \\boxed{4}"},
        {"prompt": "3+3?", "answer": "easy\n#### 1,006", "kind": "general"},
        "",
        {"question": "4?", "answer": ["4", "5"]},
    )
    a, b, c, d = problems(file)
    assert a == Problem(id="a", kind="math", question="1+1?", answer="2", language="zh", source="school")
    assert (b.id, b.answer, b.source, b.language) == ("mine/1", "4", "mine", "en")
    assert (c.answer, c.kind) == ("1006", "general")
    assert (d.id, d.answer) == ("mine/3", "4, 5")
    assert problems(file, count=2) == [a, b]


def test_code_rows_become_tests(tmp_path):
    file = write(
        tmp_path / "code.jsonl",
        {
            "id": "he",
            "prompt": "def f(x):\n",
            "entry_point": "f",
            "test": "def check(c):\n    assert c(1) == 2",
        },
        {"id": "mb", "problem": "Add.", "test_setup_code": "import math", "test_list": ["assert g(1) == 2"]},
        {"id": "io", "problem": "Echo.", "tests": [{"input": "1\n", "output": "1\n"}]},
        {"id": "own", "question": "Write h.", "tests": ["assert h() == 1"], "kind": "code"},
    )
    he, mb, io, own = problems(file)
    assert {p.kind for p in (he, mb, io, own)} == {"code"} and not any(p.answer for p in (he, mb, io, own))
    assert he.tests == ("def check(c):\n    assert c(1) == 2\ncheck(f)",) and "def f(x):" in he.question
    assert mb.tests == ("import math", "assert g(1) == 2") and "assert g(1) == 2" in mb.question
    assert io.tests == (StdioTest("1\n", "1\n"),) and "stdin" in io.question
    assert own.tests == ("assert h() == 1",) and own.question == "Write h."


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"problem": "x", "answer": ', "bad.jsonl:2: not a line of JSON"),
        ("[1]", "bad.jsonl:2: expected a JSON object, found list"),
        ("null", "bad.jsonl:2: expected a JSON object, found NoneType"),
        ('{"answer": "1"}', "bad.jsonl:2: no question"),
        ('{"problem": "x"}', "bad.jsonl:2: no answer"),
        ('{"problem": "x", "answer": "1", "kind": "poem"}', "bad.jsonl:2: kind 'poem' must be one of"),
        ('{"problem": "x", "answer": "1", "language": "fr"}', "bad.jsonl:2: language 'fr'"),
        ('{"problem": "x", "kind": "code"}', "bad.jsonl:2: a code problem without tests"),
        ('{"problem": "x", "tests": 1}', "bad.jsonl:2: tests: a test is a Python statement"),
        ('{"problem": "x", "tests": [{"input": "1"}]}', "bad.jsonl:2: tests: a test is a Python statement"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named_with_its_number(tmp_path, bad, message):
    file = write(tmp_path / "bad.jsonl", {"problem": "fine", "answer": "1"}, bad)
    with pytest.raises(UserError) as error:
        problems(file, rows=STRICT)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_bytes_that_are_not_text_are_named_too(tmp_path):
    file = tmp_path / "latin.jsonl"
    file.write_bytes(b'{"problem": "x", "answer": "1"}\n{"problem": "\xe9", "answer": "1"}\n')
    with pytest.raises(UserError, match=r"latin\.jsonl:2: not a line of JSON"):
        problems(str(file), rows=STRICT)


def test_an_empty_file_a_missing_one_and_an_unknown_name_are_user_errors(tmp_path):
    with pytest.raises(UserError, match=r"empty\.jsonl holds no problem"):
        problems(write(tmp_path / "empty.jsonl"))
    with pytest.raises(UserError, match=r"no file nowhere\.jsonl"):
        problems("nowhere.jsonl", data_dir=tmp_path)
    with pytest.raises(UserError, match=r"unknown problem set 'mathe500'.*math500"):
        problems("mathe500")
    with pytest.raises(UserError, match="count 0 must be at least 1"):
        problems("heldout", count=0)


def test_mbpp_gives_the_papers_test_split(tmp_path):
    row = {"problem": "Add.", "test_list": ["assert g(1) == 2"]}
    write(tmp_path / "mbpp.jsonl", {"id": "1", "split": "train", **row}, {"id": "2", "split": "test", **row})
    assert [p.id for p in problems("mbpp", data_dir=tmp_path)] == ["2"]
    assert [p.id for p in problems("mbpp", data_dir=tmp_path, split="train")] == ["1"]


# ---- generators


def test_generated_sets_are_their_arguments_only_and_do_not_overlap():
    train = problems("generator:tiny", count=60, split="train", seed=3)
    heldout = problems("heldout", count=60, seed=3)
    assert problems("heldout", count=60, seed=3) == heldout != problems("heldout", count=60, seed=4)
    assert len(heldout) == 60 and not {p.question for p in train} & {p.question for p in heldout}
    assert len(problems("heldout")) == 320
    with pytest.raises(UserError, match="unknown task 'chess'"):
        problems("generator:chess")


# ---- the hub


def fake_hub(monkeypatch, load):
    monkeypatch.setattr("pipeline.data.hub.hub_answers", lambda: True)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))


def test_the_hub_is_asked_where_there_is_no_file(tmp_path, monkeypatch):
    asked = []

    def load(path, config, split):
        asked.append((path, config, split))
        return [{"question": "Janet?", "answer": "many\n#### 1,018"}]

    fake_hub(monkeypatch, load)
    (found,) = problems("gsm8k", data_dir=tmp_path)
    assert asked == [("openai/gsm8k", "main", "test")]
    assert (found.id, found.answer, found.source) == ("gsm8k/0", "1018", "gsm8k")
    (found,) = problems("hub:me/sums:hard:validation")
    assert asked[1] == ("me/sums", "hard", "validation") and found.source == "me/sums"
    problems("hub:me/sums:train")
    assert asked[2] == ("me/sums", None, "train")
    with pytest.raises(UserError, match="the form is hub:OWNER/NAME:SPLIT"):
        problems("hub:me/sums")


def test_a_local_file_wins_over_the_hub_and_r1_data_names_its_folder(tmp_path, monkeypatch):
    fake_hub(monkeypatch, lambda *a, **k: pytest.fail("the hub was asked"))
    write(tmp_path / "gsm8k_test.jsonl", {"id": "local", "problem": "Janet?", "answer": "18"})
    monkeypatch.setenv("R1_DATA", str(tmp_path))
    assert [p.id for p in problems("gsm8k")] == ["local"]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_when_neither_can_be_read_the_error_names_both_ways(tmp_path, monkeypatch, name):
    def load(*_, **__):
        raise ConnectionError("no route\nto host")

    fake_hub(monkeypatch, load)
    for folder in (tmp_path, None):
        with pytest.raises(UserError) as error:
            problems(name, data_dir=folder)
        text = str(error.value)
        for part in (
            name,
            FILES.get(name, f"{name}.jsonl"),
            "--data",
            "R1_DATA",
            BENCHMARKS[name].path,
            "no route",
        ):
            assert part in text
        assert "\n" not in text


# ---- the real files


@needs_data
@pytest.mark.parametrize(
    ("name", "count"),
    [("math500", 500), ("aime24", 30), ("aime25", 30), ("amc23", 40), ("gsm8k", 1319), ("humaneval", 164),
     ("mbpp", 500), ("olympiadbench", 675), ("minerva_math", 272), ("gsm8k_train", 7473),
     ("math_train", 7470)],
)  # fmt: skip
def test_benchmarks_load_whole(name, count):
    found = problems(name, data_dir=SHARED)
    assert len(found) == len({p.id for p in found}) == count
    assert all(bool(p.tests) == (p.kind == "code") == (not p.answer) for p in found)


@needs_data
def test_reference_programs_pass_the_tests_as_we_pose_them():
    from rewards.programs.grade import run_tests

    for name, key in (("humaneval", "canonical_solution"), ("mbpp", "solution")):
        rows = {r["id"]: r for r in map(json.loads, (SHARED / f"{name}.jsonl").read_text().splitlines())}
        for problem in problems(name, data_dir=SHARED, count=3):
            row = rows[problem.id]
            assert run_tests(row.get("prompt", "") + row[key], problem.tests).value == 1
            assert run_tests("def wrong(*_):\n    return None", problem.tests).value == 0


# ---- order


def test_order_is_a_shuffle_that_depends_on_seed_and_epoch_only():
    assert order(50, 1, 0) == order(50, 1, 0)
    assert sorted(order(50, 1, 0)) == list(range(50))
    assert len({tuple(order(50, seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert order(5, 0, 0) == [4, 2, 1, 0, 3], "a resumed run of an earlier version would see other problems"
