"""Public data: traces in every known shape, rows without an answer, models of the hub."""

from __future__ import annotations

import json
import random
import sys
import types
from pathlib import Path

import pytest

from pipeline.data.corpus import Row, read_corpus, sampled
from pipeline.data.hub import hub_model, is_model_name
from pipeline.data.problems import problems
from pipeline.errors import UserError
from pipeline.settings.common import RowSettings

TRACE = "<think>\nOne and one.\n</think>\n\nThe sum is $\\boxed{2}$."
TAGGED = "<think>\nOne and one.\n</think>\n<answer>The sum is $\\boxed{2}$.</answer>"


@pytest.fixture
def hub(monkeypatch):
    """`hub(*rows)`: the rows of every data set of the hub."""

    def install(*rows):
        monkeypatch.setattr("pipeline.data.hub.hub_answers", lambda: True)
        load = lambda path, config, split: list(rows)  # noqa: E731
        monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))

    return install


# ---- traces


@pytest.mark.parametrize(
    "row",
    [
        {"problem": " 1+1? ", "generation": TRACE},
        {"problem": "1+1?", "generation": TAGGED},
        {"question": "1+1?", "generations": ["I give up", TRACE, TRACE.replace("2", "3")]},
        {
            "problem": "1+1?",
            "generations": [TRACE.replace("2", "3"), TRACE],
            "correctness_math_verify": [False, True],
            "correctness_llama": None,
        },
        {
            "problem": "1+1?",
            "generations": [TRACE.replace("2", "3"), TRACE],
            "correctness_math_verify": [False, False],
            "correctness_llama": [None, True],
        },
        {
            "messages": [
                {"role": "system", "content": "Think."},
                {"role": "user", "content": "1+1?"},
                {"role": "assistant", "content": TRACE},
            ]
        },
    ],
)
def test_a_public_trace_becomes_ours_whatever_its_shape(hub, row):
    hub(row)
    (found,) = read_corpus("hub:me/traces:train")
    want = Row("me/traces/0", "1+1?", TAGGED, "The sum is $\\boxed{2}$.", source="me/traces")
    assert found == want


@pytest.mark.parametrize(
    "row",
    [
        {"problem": "1+1?", "generation": "2"},
        {"problem": "1+1?", "generation": "<think>\nstill thinking"},
        {"problem": "1+1?", "generation": "<think>a</think>"},
        {"problem": "1+1?", "generation": "<think>a</think>b</think>c"},
        {"problem": "1+1?", "generations": [TRACE], "correctness_math_verify": [False]},
    ],
)
def test_a_trace_that_is_not_complete_or_not_right_is_left_out_and_counted(hub, row, capsys):
    hub(row, {"uuid": "good", "problem": "1+1?", "generation": TRACE})
    assert [found.id for found in read_corpus("hub:me/traces:train")] == ["good"]
    assert (
        "left out traces that are not complete, or not right, of 1 of its 2 rows" in capsys.readouterr().out
    )
    hub(row)
    with pytest.raises(UserError, match="hub:me/traces:train has no rows with a complete trace"):
        read_corpus("hub:me/traces:train")


def test_a_row_of_another_shape_is_named(hub, tmp_path):
    hub({"text": "Call me Ishmael."})
    with pytest.raises(UserError, match=r"me/traces \(train\) row 0: not a corpus row; expected"):
        read_corpus("hub:me/traces:train")
    file = tmp_path / "c.jsonl"
    file.write_text(json.dumps({"problem": "1+1?", "generation": TRACE}) + '\n{"problem": "2?"}\n')
    with pytest.raises(UserError, match=r"c\.jsonl:2: not a corpus row"):
        read_corpus(file, rows=RowSettings(max_bad_rows=0))


def test_a_sample_of_the_rows_is_uniform_and_fixed_by_the_seed():
    rows = [Row(str(i), "q", "c") for i in range(10)]
    assert sampled(rows, 0, random.Random(0)) == rows == sampled(rows, 20, random.Random(0))
    picks = [{row.id for row in sampled(iter(rows), 3, random.Random(seed))} for seed in range(2_000)]
    assert all(len(pick) == 3 for pick in picks)
    shares = [sum(str(i) in pick for pick in picks) / len(picks) for i in range(10)]
    assert max(abs(share - 0.3) for share in shares) < 0.04  # 4 standard errors
    assert sampled(rows, 3, random.Random(1)) == sampled(rows, 3, random.Random(1))


# ---- problems


def test_rows_of_the_hub_without_an_answer_are_left_out_and_counted(hub, capsys, tmp_path):
    hub({"problem": "1+1?", "answer": "2"}, {"problem": "2+2?", "solution": "\\boxed{}"})
    assert [p.question for p in problems("hub:me/sums:train")] == ["1+1?"]
    assert "me/sums: left out 1 of 2 rows; the first: me/sums (train) row 1" in capsys.readouterr().out
    hub({"problem": "2+2?"})
    with pytest.raises(UserError, match="row 0: no answer"):
        problems("hub:me/sums:train")
    file = tmp_path / "mine.jsonl"
    file.write_text('{"problem": "1+1?", "answer": "2"}\n{"problem": "2+2?"}\n')
    with pytest.raises(UserError, match=r"mine\.jsonl:2: no answer"):
        problems(str(file), rows=RowSettings(max_bad_rows=0))


def test_rows_in_the_form_of_verl(hub):
    turns = [{"role": "system", "content": "Think."}, {"role": "user", "content": "1+1?"}]
    hub({"prompt": turns, "reward_model": {"ground_truth": "2", "style": "rule"}, "solution": "2"})
    (found,) = problems("hub:me/sums:train")
    assert (found.question, found.answer) == ("1+1?", "2")


# ---- models


def test_a_models_name_is_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_model_name("Qwen/Qwen2.5-1.5B")
    Path("Qwen").mkdir()
    for path in ("Qwen/Qwen2.5-1.5B", "sft", "./m", "/a/b", "a/b/c", "../m", "a/.b"):
        assert not is_model_name(path), path


def test_a_model_comes_from_the_hub_or_its_cache(monkeypatch, tmp_path):
    asked = []

    def download(name, **how):
        asked.append((name, how["revision"], how["local_files_only"]))
        return str(tmp_path / "abc123")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for answers in (True, False):
        monkeypatch.setattr("pipeline.data.hub.hub_answers", lambda answers=answers: answers)
        assert hub_model("me/model", "abc123").name == "abc123"
    assert asked == [("me/model", "abc123", False), ("me/model", "abc123", True)]


def test_without_hub_and_cache_the_error_names_both_ways(monkeypatch, tmp_path):
    monkeypatch.setattr("pipeline.data.hub.hub_answers", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as error:
        hub_model("me/model")
    text = str(error.value)
    assert "\n" not in text
    for part in ("me/model", "out of reach and its cache has no copy", "go online", "name their directory"):
        assert part in text, text
