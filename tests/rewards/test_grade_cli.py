"""`python -m pipeline grade`: every line answered, in order, whatever it holds."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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
    assert (
        capsys.readouterr().err == f"error: grade: {missing}: No such file or directory; name another file\n"
    )
    missing.write_text("{}\n")
    assert main(["grade", str(missing), str(missing)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    with pytest.raises(ValueError, match="kind='maths'"):
        grade_file(missing, tmp_path / "out.jsonl", "maths", "lenient")


def test_grading_needs_no_torch():
    script = "import sys, pipeline.tools.grade; sys.exit('torch' in sys.modules or 'sympy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == 0


@pytest.mark.parametrize("end, code", [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_it_ends_at_once_and_leaves_nothing(tmp_path, end, code):
    """While slow programs run and many more are queued; SIGKILL hits the grading process alone."""
    line = {"tests": ["assert f() == 1"], "completion": "import time\ntime.sleep(3)"}
    rows = [json.dumps(line | {"completion": line["completion"] + f"\n# {i}"}) for i in range(60)]
    (tmp_path / "in.jsonl").write_text("\n".join(rows))
    (tmp_path / "tmp").mkdir()
    command = [sys.executable, "-m", "pipeline", "grade", tmp_path / "in.jsonl", tmp_path / "out.jsonl"]
    env = os.environ | {"TMPDIR": str(tmp_path / "tmp")}
    process = subprocess.Popen(command, env=env, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while len(workers := children(process.pid)) < 2 or not all(map(children, workers)):
        assert time.monotonic() < deadline, "no program was started"
        time.sleep(0.05)
    family = [pid for worker in workers for pid in (worker, *children(worker))]
    time.sleep(0.3)
    process.send_signal(end)
    began = time.monotonic()
    assert process.wait(timeout=20) == code
    assert time.monotonic() - began < 2.5, "less than one program takes"
    while any(map(alive, family)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert os.listdir(tmp_path / "tmp") == []


def children(pid: int) -> list[int]:
    """Those of all its threads."""
    return [
        int(child)
        for file in Path(f"/proc/{pid}/task").glob("*/children")
        for child in file.read_text().split()
    ]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_line_says_how_many_tests_its_question_shows(tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    row = {
        "tests": ["assert f(1) == 2", "assert f(5) == 6"],
        "completion": "def f(x): return {1: 2, 5: 6}[x]",
    }
    lines = [row, row | {"shown": 0}, row | {"shown": "all"}]
    source.write_text("\n".join(map(json.dumps, lines)))
    assert grade_file(source, out) == {"correct": 1, "incorrect": 1, "error": 1}
