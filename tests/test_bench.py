"""`make bench`: what it says of a name that it does not know, of missing data, of a bound that is missed."""

import json
from types import SimpleNamespace

import pytest

from tests import data
from tests.bench import __main__ as bench
from tests.bench import measure


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
