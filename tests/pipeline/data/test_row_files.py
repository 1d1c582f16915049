"""Files of rows: their formats, bad rows and how many are left out, other keys, and what training shows."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace

import pytest

from pipeline.data.pool import fitting, hold_back
from pipeline.data.problems import problems
from pipeline.data.rows import to_problem
from pipeline.errors import UserError
from pipeline.settings.common import RowSettings
from pipeline.settings.rollouts import GrpoSettings
from rollout.text.tokenizer import encode_prompt
from rollout.types import Problem
from tests.small import random_policy

STRICT = RowSettings(max_bad_rows=0)

ROWS = [{"problem": "1+1?", "answer": "2"}, {"problem": "2+2?", "answer": "4"}]


def test_files_of_every_format_hold_the_same_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    lines = "\n".join(map(json.dumps, ROWS))
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.replace("\n", "\r\n\r\n \r\n").encode())
    (tmp_path / "b.json").write_bytes(b"\xef\xbb\xbf \n" + json.dumps(ROWS, indent=2).encode())
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "d.json").write_text(lines)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "e.parquet")
    for file in sorted(tmp_path.iterdir()):
        assert [(p.question, p.answer) for p in problems(str(file), rows=STRICT)] == [
            ("1+1?", "2"),
            ("2+2?", "4"),
        ]
    with pytest.raises(
        UserError, match=r"is a folder; name one of its files: a\.jsonl, b\.json, c\.jsonl\.gz, "
    ):
        problems(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl.gz", gzip.compress(b'{"problem": "x"}' * 99)[:40]),
        ("b.jsonl.gz", b"not packed"),
        ("c.parquet", b"PAR1 and no more"),
        ("d.jsonl", b""),
        ("e.json", b"[]"),
        ("f.json", b"[{]"),
        ("g.jsonl", "x".encode("utf-16")),
        ("h.jsonl", b"\x00\xff" * 99),
    ],
)
def test_a_damaged_file_is_an_error_that_names_it(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=name.partition(".")[0]) as error:
        problems(str(tmp_path / name))
    assert "\n" not in str(error.value)


# ---- bad rows


def test_bad_rows_are_left_out_and_counted_up_to_a_share_or_a_number(tmp_path, capsys):
    good, golds = json.dumps(ROWS[0]), ("proof", "notfound", "", None, True, {"value": 2})
    bad = ['{"problem": "cut', *(json.dumps({"problem": "2+2?", "answer": gold}) for gold in golds)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join([*[good] * 600, *bad, *[good] * 200]))
    assert len(problems(str(file))) == 800
    assert "rows: left out 7 of 807 rows; the first: " in capsys.readouterr().out
    assert len(problems(str(file), rows=RowSettings(max_bad_rows=7))) == 800
    for most in (0, 0.008, 1, 6):
        with pytest.raises(UserError) as error:
            problems(str(file), rows=RowSettings(max_bad_rows=most))
        text = str(error.value)
        assert "rows.jsonl:601: not a line of JSON" in text and text.count("rows.jsonl:") == 3
        assert text.count("not a line of JSON") == 1, "a reason is given once"
        assert "(7 bad rows of 807); --max-bad-rows 7 leaves them out" in text and "\n" not in text


@pytest.mark.parametrize(("good", "bad", "left"), [(1, 1, True), (3, 3, True), (2, 3, False), (4, 4, False)])
def test_few_bad_rows_are_allowed_in_a_small_file_but_never_most_of_it(tmp_path, good, bad, left):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join([json.dumps(ROWS[0])] * good + ["{"] * bad))
    if left:
        assert len(problems(str(file))) == good
    else:
        with pytest.raises(UserError, match=rf"\({bad} bad rows of {good + bad}\)"):
            problems(str(file))


def test_a_cut_to_the_pool_is_said(tmp_path, capsys):
    file = tmp_path / "many.jsonl"
    file.write_text("\n".join(json.dumps({"problem": f"{i}+1?", "answer": i + 1}) for i in range(50)))
    assert len(problems(str(file), count=40, split="train")) == 40
    assert "the first 40 problems of 50 rows are used; --pool takes more" in capsys.readouterr().out
    assert len(problems(str(file), count=50, split="train")) == 50 and not capsys.readouterr().out


# ---- keys of one's own


def test_fields_name_the_keys_of_other_shapes(tmp_path):
    row = {"Body": "1+1?", "meta": {"key": "2"}, "nr": 5, "answer": "3", "checks": ["assert f(1) == 2"]}
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps(row))
    (found,) = problems(str(file), rows=RowSettings(fields="question=Body,answer=meta.key,id=nr"))
    assert (found.id, found.question, found.answer) == ("mine/5", "1+1?", "2")
    (found,) = problems(str(file), rows=RowSettings(fields="question=Body, tests=checks"))
    assert (found.kind, found.tests) == ("code", ("assert f(1) == 2",))
    with pytest.raises(
        UserError, match=r"mine\.jsonl:1: no key meta\.keys, which --fields names; it has: Body"
    ):
        problems(str(file), rows=RowSettings(fields="question=Body,answer=meta.keys"))
    for wrong in ("question", "question=", "poem=Body", "=x"):
        with pytest.raises(ValueError, match="write NAME=KEY, with a name of: question"):
            RowSettings(fields=wrong)


# ---- hold back


def test_training_shows_some_of_the_asserts_and_grades_all(tmp_path):
    listed = [f"assert f({i}) == {i}" for i in range(3)]
    row = {"text": "Keep it.", "test_list": listed, "test_setup_code": "import math"}
    whole = to_problem(row, "mbpp", 0, {})
    assert whole.shown == 4 and whole.question.endswith("\n" + "\n".join(listed))
    for share, shown in ((0, 3), (0.3, 2), (0.34, 1), (0.5, 1), (1, 1)):
        part = hold_back(whole, share)
        assert part.question.endswith("pass these tests:\n\n" + "\n".join(listed[:shown])), share
        assert part.tests == whole.tests and part.shown == 1 + shown
        assert not any(test in part.question for test in listed[shown:])
    one = to_problem(row | {"test_list": listed[:1]}, "mbpp", 0, {})
    assert hold_back(one, 0.9) == one
    cases = {"description": "Add.", "public_tests": {"input": ["3 4", "1 1"], "output": ["7", "2"]}}
    for other in (replace(whole, question="Keep it.", shown=0), to_problem(cases, "c", 0, {})):
        assert hold_back(other, 0.9) == other


def test_too_long_problems_are_left_out_and_counted(tokenizer, tmp_path, capsys):
    model = random_policy(tmp_path / "model", tokenizer, "r1-zero-short", max_position_embeddings=96)
    found = [Problem(str(n), "math", "1" + "+1" * n, str(n + 1)) for n in (1, 3, 100)]
    config = GrpoSettings(template="r1-zero-short", max_tokens=40)
    assert fitting(found, config, tokenizer, model) == found[:2]
    said = capsys.readouterr().out
    assert said == "1 of 3 problems with max_tokens=40 exceed the model's context of 96 tokens: left out\n"
    longest = 96 - len(encode_prompt(tokenizer, found[0].question, "r1-zero-short"))
    with pytest.raises(
        UserError, match=rf"all 3 problems of the list with max_tokens=96 .* to at most {longest}"
    ):
        fitting(found, replace(config, max_tokens=96), tokenizer, model)
    assert fitting(found, replace(config, max_tokens=longest), tokenizer, model) == found[:1]
