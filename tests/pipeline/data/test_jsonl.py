"""JSON lines: bad lines by number, torn ends, text that looks like a line end or that UTF-8 cannot hold."""

from __future__ import annotations

import json

import pytest

from pipeline.data.jsonl import BadRow, located, object_of, read_log, write_jsonl
from pipeline.errors import UserError

ROWS = [{"text": "a\u2028b\u0085c\x0bd"}, {"text": "你好 \ud800"}, {"n": 1.5, "none": None}]


def test_rows_come_back_with_their_numbers(tmp_path):
    file = tmp_path / "a.jsonl"
    write_jsonl(file, iter(ROWS))
    assert list(located(file)) == [(f"{file}:{number}", row) for number, row in enumerate(ROWS, 1)]
    assert read_log(file) == ROWS
    assert json.loads(file.read_bytes().split(b"\n")[1]) == ROWS[1], (
        "a lone surrogate is escaped as JSON does"
    )
    assert "你好".encode() in file.read_bytes(), "other text is not"


def test_blank_lines_and_a_byte_order_mark_are_skipped(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{}\n{"a": 2}')
    assert [(where.rpartition(":")[2], row) for where, row in located(file)] == [
        ("1", {"a": 1}),
        ("4", {}),
        ("5", {"a": 2}),
    ]


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (b'{"a": ', "not a line of JSON"),
        (b'{"a": "\xe9"}', "not a line of JSON"),
        (b"[" * 200_000, "not a line of JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not a line of JSON"),
        (b"null", "expected a JSON object, found NoneType"),
        (b"[1]", "expected a JSON object, found list"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path, bad, what):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"a": 1}\n' + bad + b"\n")
    (_, good), (where, row) = located(file)
    assert object_of(good) == {"a": 1} and where == f"{file}:2"
    with pytest.raises(BadRow, match=what) as error:
        object_of(row)
    assert "\n" not in str(error.value)


def test_a_torn_end_is_left_out_of_a_log_only(tmp_path):
    file = tmp_path / "a.jsonl"
    complete = '{"a": 1}\n{"text": "一二"}'.encode()
    for cut in range(10, len(complete)):  # from within the second line to before its end
        file.write_bytes(complete[:cut])
        assert read_log(file) == [{"a": 1}]
        assert isinstance(list(located(file))[1][1], BadRow)
    file.write_bytes(complete)
    assert len(read_log(file)) == 2, "complete, though without its line feed"


def test_no_file_is_an_empty_log_and_otherwise_an_error(tmp_path):
    assert read_log(tmp_path / "none.jsonl") == []
    for path, what in ((tmp_path / "none.jsonl", "No such file"), (tmp_path, "is a folder")):
        with pytest.raises(UserError, match=rf"{path}.*{what}"):
            list(located(path))


@pytest.mark.parametrize("bad", [b"{", b"\x00\xff", b"[1]", b'{"a": 1}{"a": 2}', b"3"])
def test_a_damaged_line_of_a_log_costs_no_other_and_is_said(tmp_path, capsys, bad):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n' + bad + b'\n{"step": 3}\n' + bad + b'\n{"step": 5}\n{"st')
    assert read_log(file) == [{"step": 1}, {"step": 3}, {"step": 5}]
    assert capsys.readouterr().out == f"{file}: left out what is damaged: line 2, 4\n"
