"""`make bench`: what it says of a name that it does not know, of missing data, of a bound that is missed."""

import json
from types import SimpleNamespace

import pytest

from tests import data
from tests.bench import __main__ as bench
from tests.bench import measure, steady


@pytest.fixture
def results(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    return tmp_path


def claiming(value):
    claim = {"claim": "fast", "value": value, "at_least": 2.0}
    return SimpleNamespace(SUMMARY="made up", run=lambda: {"claims": [claim]})


def test_a_name_that_it_does_not_know_lists_those_it_does(capsys):
    assert bench.main(["rewards_maths"]) == 2
    said = capsys.readouterr().err
    assert all(name in said for name in bench.names()) and said.count("\n") == 1


def test_without_the_data_it_says_so_writes_nothing_and_goes_on(results, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(data, "FOLDER", tmp_path / "absent")
    monkeypatch.setitem(bench.sys.modules, "tests.bench.train", claiming(3.0))
    assert bench.main(["rewards_agreement", "rewards_math", "rewards_code", "train"]) == 2
    said = capsys.readouterr().err
    assert said.count("set R1_DATA to the folder that holds") == 3
    assert [path.name for path in results.iterdir()] == ["bench-train.json"]


@pytest.mark.parametrize(("value", "code"), [(2.0, 0), (1.9, 1)])
def test_a_bound_that_is_missed_is_shown_and_is_the_exit_code(results, monkeypatch, capsys, value, code):
    monkeypatch.setitem(bench.sys.modules, "tests.bench.train", claiming(value))
    assert bench.main(["train"]) == code
    assert ("MISSED" in capsys.readouterr().out) is bool(code)
    written = json.loads((results / "bench-train.json").read_text())
    assert written["claims"][0]["value"] == value and {"date", "machine", "commit"} <= set(written)


def test_steady_sees_equal_samples_lost_memory_and_problems_that_come_twice(tmp_path):
    group = [steady.Sample("p", bytes([n]), 1e-6) for n in range(4)]
    found = steady.equals([group] * 100)
    assert found == {"pairs": 600, "equal": 0, "expected": pytest.approx(6e-4)} and steady.excess(found) < 0
    one_stream = steady.equals([group[:1] * 4, group])
    assert one_stream["equal"] == 6 and steady.excess(one_stream) > 3
    certain = steady.equals([[steady.Sample("p", b"", 1.0)] * 4])
    assert certain["equal"] == certain["expected"] == 6
    assert steady.repeats(list("abcbca"), 3) == 0 and steady.repeats(list("abacba"), 3) == 1
    before = steady.in_use(tmp_path / "malloc.xml")
    held = [bytearray(1 << 20) for _ in range(50)]
    assert 45 << 20 < steady.in_use(tmp_path / "malloc.xml") - before < 60 << 20 and held
