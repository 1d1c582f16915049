"""`python -m pipeline grade`: every line answered, in order, whatever it holds."""

import json
import subprocess
import sys

import pytest

from pipeline.__main__ import main
from pipeline.tools import grade
from pipeline.tools.grade import grade_file

LINES = [
    b'{"id": 1, "answer": "7", "completion": "<think>a</think><answer>7</answer>"}',
    b"{not json",
    b'{"answer": "7", "completion": "8", "extra": [1]}',
    b"",
    b"[1, 2]",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"answer": 42, "completion": "\xe7\xad\x94\xe6\xa1\x88\xe6\x98\xaf42"}',
    b'{"completion": "7"}',
    b'{"answer": "7"}',
    b'{"answer": "7", "completion": 7}',
    b'{"answer": "\\\\frac{", "completion": "7"}',
    b'{"answer": "7", "completion": "\\ud800"}',
    b'{"tests": ["assert f(1) == 2"], "completion": "```python\\ndef f(x): return x + 1\\n```"}',
    b'{"tests": ["assert f(1) == 2"], "completion": "import os; os._exit(0)"}',
    b'{"tests": [{"input": "3", "output": "6"}], "completion": "print(int(input()) * 2)"}',
    b'{"tests": [3], "completion": "x = 1"}',
    b'{"tests": [], "completion": "x = 1"}',
    b'{"answer": "7", "completion": "so it is\\u2028 #### 7"}',
]
WANT = (  # noqa: SIM905
    "correct error incorrect error error error error correct error error error error incorrect "
    "correct incorrect correct error error correct"
).split()


def test_every_line_is_answered_in_order(tmp_path, capsys):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"\n".join(LINES))
    assert main(["grade", str(source), str(out)]) == 0
    rows = [json.loads(line) for line in out.read_bytes().split(b"\n")[:-1]]
    assert [row["verdict"] for row in rows] == WANT
    assert all({"verdict", "extracted", "detail"} <= row.keys() for row in rows)
    assert rows[0]["id"] == 1 and rows[2]["extra"] == [1] and rows[2]["extracted"] == "8"
    assert rows[1]["line"] == 2 and "line 2" in rows[1]["detail"]
    counts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert counts == {verdict: WANT.count(verdict) for verdict in ("correct", "incorrect", "error")}


def test_a_line_too_long_to_be_one_is_answered_too(tmp_path, monkeypatch):
    monkeypatch.setattr(grade, "LONGEST_LINE", 1000)
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    good = b'{"answer": "7", "completion": "7"}'
    source.write_bytes(b"\n".join([good, b'{"answer": "' + b"7" * 3500 + b'"}', good, b"x" * 1000, good]))
    assert grade_file(source, out) == {"correct": 3, "incorrect": 0, "error": 2}
    rows = [json.loads(line) for line in out.open()]
    assert [row["verdict"] for row in rows] == ["correct", "error", "correct", "error", "correct"]
    assert "longer than 1000 bytes" in rows[1]["detail"] and rows[1]["line"] == 2


def test_it_says_what_holds_the_programs(tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    source.write_text('{"tests": ["assert x == 1"], "completion": "x = 1"}\n')
    assert main(["grade", str(source), str(tmp_path / "out.jsonl")]) == 0
    said = capsys.readouterr()
    assert "rlimits" in said.err and "rlimits" not in said.out


def test_strict_mode_and_forced_kind(tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"answer": "7", "completion": "7", "tests": ["pass"]}\n')
    assert grade_file(source, out, "math", "lenient") == {"correct": 1, "incorrect": 0, "error": 0}
    assert grade_file(source, out, "math", "strict") == {"correct": 0, "incorrect": 1, "error": 0}
    assert grade_file(source, out, None, "strict") == {
        "correct": 0,
        "incorrect": 0,
        "error": 1,
    }  # asks nothing


def test_wrong_input_is_one_line_and_exit_code_2(tmp_path, capsys):
    missing = tmp_path / "none.jsonl"
    assert main(["grade", str(missing), str(tmp_path / "out.jsonl")]) == 2
    missing.write_text("{}\n")
    assert main(["grade", str(missing), str(missing)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 2
    with pytest.raises(ValueError, match="kind='maths'"):
        grade_file(missing, tmp_path / "out.jsonl", "maths", "lenient")


def test_grading_needs_no_torch():
    script = "import sys, pipeline.tools.grade; sys.exit('torch' in sys.modules or 'sympy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == 0
