"""What the cold start and rejection sampling keep, and what they refuse."""

import dataclasses
import json

import pytest

from pipeline.data.card import lengths
from pipeline.data.corpus import Row, read_corpus, readable, split_blocks, write_corpus
from pipeline.errors import UserError
from pipeline.settings.common import RowSettings
from pipeline.settings.supervised import SftSettings
from pipeline.stages.sft import kept_samples
from pipeline.train.rollouts import rollout_metrics
from rollout.types import Graded, Problem, Prompt, Rollout

GOOD = "<think>\nFirst 3+4.\nSo 7.\n</think>\n<answer>7</answer>"


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        (GOOD, ("First 3+4.\nSo 7.", "7")),
        (" <think>a</think> <answer> 7 </answer>\n", ("a", "7")),
        ("<think>a</think>", None),
        ("<think>a</think><answer>7</answer> and more", None),
        ("<think>a<think>b</think><answer>7</answer>", None),
        ("<think>a</think><answer>7</answer><answer>8</answer>", None),
        ("", None),
    ],
)
def test_blocks(text, blocks):
    assert split_blocks(text) == blocks


def test_a_line_said_twice_is_not_readable():
    assert readable("a\nb")
    assert not readable("a\nb\na")
    assert not readable(" \n ")


def test_markup_and_a_rare_repetition_are_readable():
    steps = [f"So we have\n\\[\n\\begin{{aligned}}\nx_{n} = {n}\n\\end{{aligned}}\n\\]" for n in range(3)]
    assert not readable("\n".join(steps)), "a third of the prose is the same line"
    steps = [step.replace("So", f"{n} times") for n, step in enumerate(steps)]
    assert readable("\n".join(steps)) and not readable("\\[\n\\]")
    lines = [f"Step {n}." for n in range(20)]
    assert readable("\n".join([*lines, "Step 3."])) and readable("\n".join([*lines, "Step 3.", "Step 4."]))
    assert not readable("\n".join([*lines, *lines[:3]]))


def sample(**changes):
    base = {
        "id": "x", "question": "q1", "text": GOOD, "verdict": "correct", "parts": {"language": 1.0},
        "language": "en", "kind": "math",
    }  # fmt: skip
    return base | changes


def test_only_right_readable_one_language_samples_join_the_cold_start_latest_first():
    config = SftSettings(samples_from="zero", max_samples=2)
    samples = [
        sample(question="old"),
        sample(question="wrong", verdict="incorrect"),
        sample(question="failed", verdict="error"),
        sample(question="mixed", parts={"language": 0.5}),
        sample(question="repeats", text=GOOD.replace("So 7.", "First 3+4.")),
        sample(question="format", text="7"),
        sample(question="q1"),
        sample(question="q1", text=GOOD.replace("So", "Then")),
    ]
    kept = kept_samples(samples, config)
    assert [row.question for row in kept] == ["q1", "old"]
    assert "Then 7." in kept[0].completion  # of two answers to a question the later one
    assert [r.question for r in kept_samples(samples, dataclasses.replace(config, max_samples=1))] == ["q1"]


def test_nothing_to_train_on_is_refused():
    with pytest.raises(ValueError, match="set corpus, curated or samples_from"):
        SftSettings()


def test_corpus_round_trip_with_any_text(tmp_path):
    rows = [Row("a", "q\u2028q", GOOD, "7", "zh"), Row("b", '"', "x\n")]
    write_corpus(tmp_path / "c.jsonl", rows)
    assert read_corpus(tmp_path / "c.jsonl") == rows


TALK = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}'


def test_of_a_conversation_the_first_answer_is_learned_and_the_rest_counted(tmp_path, capsys):
    talk = [("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]
    rows = [
        {"messages": [{"role": r, "content": c} for r, c in some]} for some in (talk, talk[1:3], talk[1:])
    ]
    rows.append({"conversations": [{"from": "gpt", "value": "Hi!"}, {"from": "human", "value": "q"},
                                   {"from": "gpt", "value": "a"}]})  # fmt: skip
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert {(row.question, row.completion) for row in read_corpus(tmp_path / "c.jsonl")} == {("q", "a")}
    said = capsys.readouterr().out
    assert "c.jsonl: left out later turns of 2, system prompts of 1 of its 4 rows" in said
    (tmp_path / "c.jsonl").write_text(json.dumps(rows[1]) + "\n")
    assert read_corpus(tmp_path / "c.jsonl") and not capsys.readouterr().out


def test_alpacas_input_is_part_of_the_question(tmp_path):
    rows = [
        {"instruction": "Add.", "input": "3 and 4", "output": "7"},
        {"instruction": "Hi", "input": "", "output": "a"},
    ]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_corpus(tmp_path / "c.jsonl")
    assert [(r.question, r.completion) for r in found] == [("Add.\n\n3 and 4", "7"), ("Hi", "a")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": "a", "question": "q", "completion": "c"}\nnot json\n', ":2: not a line of JSON"),
        ('{"id": "a"}\n', ":1: no question"),
        ('{"messages": "user: hi"}\n', ":1: not a corpus row"),
        ('{"messages": ["hi"]}\n', ":1: messages: 1 of 1 turns have no text"),
        (TALK.replace('"assistant"', "null"), ":1: messages: a turn's role is 'None'"),
        (TALK.replace("assistant", "asistant"), ":1: messages: a turn's role is 'asistant'; expected one of"),
        (TALK.replace('"a"', "null"), ":1: messages: 1 of 2 turns have no text"),
        (TALK.replace('"user"', '"system"'), ":1: no question"),
        ('{"instruction": "q", "input": "x", "output": null}\n', ":1: not a corpus row"),
        ('{"question": "q", "completion": null}\n', ":1: not a corpus row"),
        ('{"question": "q", "completion": "c", "answer": null}\n', ":1: answer is None, not text"),
        ('{"question": "q\\ud800", "completion": "c"}\n', ":1: a lone surrogate"),
        ("", "no rows"),
    ],
)
def test_bad_corpora_are_refused_with_the_line(tmp_path, text, message):
    (tmp_path / "c.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        read_corpus(tmp_path / "c.jsonl", rows=RowSettings(max_bad_rows=0))


def graded(reward, verdict, tokens, reason="stop"):
    prompt = Prompt(Problem("p", "math", "q"), "r1", (1,))
    rollout = Rollout(prompt, 0, 0, tuple(range(tokens)), (0.0,) * tokens, reason)
    return Graded(rollout, "", {"format": 1.0, "language": 0.5}, reward, verdict)


def test_failed_verifiers_are_counted_and_have_no_say_in_the_means():
    step = [graded(1.0, "correct", 4), graded(0.0, "incorrect", 8, "length"), graded(9.0, "error", 6)]
    metrics = rollout_metrics([*step, *step[:2], step[1]])
    assert metrics["reward/errors"] == 1
    assert metrics["reward/mean"] == pytest.approx(2 / 5)
    assert metrics["reward/accuracy"] == pytest.approx(2 / 5)
    assert metrics["rollout/truncated"] == pytest.approx(3 / 6)
    assert metrics["rollout/tokens_mean"] == pytest.approx((4 + 8 + 6 + 4 + 8 + 8) / 6)


def test_lengths_are_the_mean_and_nearest_rank_quantiles():
    """Of 1..n the quantile q is the least number with a share of q at or below it."""
    for n in (1, 2, 3, 10, 11, 100, 1_000):
        values = list(range(n, 0, -1))
        ranks = [next(v for v in range(1, n + 1) if v / n >= q - 1e-12) for q in (0.5, 0.9, 0.99)]
        assert lengths(values) == [round((n + 1) / 2), *ranks, n]
