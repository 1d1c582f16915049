"""R1's protocol end to end; worked examples; labels; what the training corpus has of a benchmark."""

from __future__ import annotations

import json

import pytest

from pipeline.__main__ import main
from pipeline.data.problems import problems
from pipeline.errors import UserError
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.prompts import samples_of, worked_shots
from pipeline.settings.evaluate import EvaluateSettings
from rollout.collect import Round
from rollout.text.tokenizer import ASSISTANT, BOS, EOS, USER
from rollout.types import Graded, Problem, Prompt, Rollout
from tests import data

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def rows_of(out):
    return [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()]


@pytest.fixture
def settings(stub, sums, tmp_path):
    """`settings(**changes)` with every default of the command."""

    def make(**changes):
        own = {"model": tmp_path / "m", "benchmark": str(sums), "out": tmp_path / "out"}
        return EvaluateSettings(**own | changes)

    stub()
    return make


# ---- the protocol


def test_the_default_is_r1s_protocol(settings, scripted):
    """Temperature 0.6, top-p 0.95, k by the size of the set, boxed, no system prompt, the tag opened."""
    engines = scripted(lambda question, sample: "1+1=2\n</think>\nSo \\boxed{2}.")
    got = evaluate(settings(limit=3))
    ((_, sampling),) = [call for call in engines[0].calls if call[1].first_index == 0]
    assert (sampling.temperature, sampling.top_p, sampling.n, sampling.stop) == (0.6, 0.95, 64, ())
    assert (got["k"], got["n"], got["template"]) == (64, 3, "boxed")
    first = rows_of(settings().out)[0]
    assert first["prompt"] == f"{BOS}{USER}1+1?\n{BOXED}{ASSISTANT}<think>\n"
    assert first["text"].startswith("<think>\n1+1=2\n</think>") and first["verdict"] == "correct"
    assert got["sampling"] == {"temperature": 0.6, "top_p": 0.95, "max_tokens": 32_768, "seed": 0}


@pytest.mark.parametrize(
    "benchmark, n, k",
    [("aime24", 30, 64), ("aime25", 2, 64), ("amc23", 40, 32), ("math500", 500, 4), ("math500", 5, 4),
     ("gsm8k", 1319, 4), ("humaneval", 164, 8), ("mbpp", 500, 4), ("own.jsonl", 30, 64),
     ("own.jsonl", 272, 4), ("own.jsonl", 250, 8), ("own.jsonl", 10_000, 4), ("generator:sum", 1, 64)],
)  # fmt: skip
def test_k_by_benchmark(settings, benchmark, n, k):
    assert samples_of(settings(benchmark=benchmark), n) == k
    assert samples_of(settings(benchmark=benchmark, temperature=0.0), n) == 1
    assert samples_of(settings(benchmark=benchmark, samples=7), n) == 7


@pytest.mark.parametrize("samples", [10**20, 65_537, -1])
def test_samples_that_no_memory_holds_are_refused(settings, samples):
    with pytest.raises(ValueError, match="samples="):
        settings(samples=samples)


def test_a_chat_template_that_knows_thinking_gets_the_tag(settings, scripted, tokenizer, monkeypatch):
    """DeepSeek's first distilled models: the template cuts past thinking and leaves the tag to the model."""
    scripted(lambda question, sample: "2</think>\\boxed{2}")
    own = tokenizer.chat_template
    monkeypatch.setattr(tokenizer, "chat_template", own.replace("<think>\\n", ""))
    assert "</think>" in tokenizer.chat_template and "<think>" not in tokenizer.chat_template
    got = evaluate(settings(samples=1))
    assert got["template"] == "boxed-think+r1"
    assert rows_of(settings().out)[0]["prompt"] == f"{BOS}{USER}1+1?\n{BOXED}{ASSISTANT}<think>\n"
    monkeypatch.setattr(
        tokenizer, "chat_template", own[: own.index("{% if add_gen")].replace("</think>", "|")
    )
    assert evaluate(settings(samples=1, out=settings().out / "2"))["template"] == "boxed+plain"


# ---- worked examples


@pytest.fixture
def solved(tmp_path):
    rows = [
        {
            "id": str(n),
            "problem": f"{n} and {n}?",
            "answer": str(2 * n),
            "solution": f"<<x>>{n}+{n}\n#### {2 * n}",
        }
        for n in range(3, 13)
    ]
    copy = {"id": "copy", "problem": "1 + 1 ?", "answer": "2", "solution": "1+1 = 2"}
    bare = {"id": "bare", "problem": "no work", "answer": "2", "solution": "2"}
    return write(tmp_path / "solved.jsonl", [copy, bare, *rows])


def test_shots_are_worked_spread_out_and_no_copies(settings, solved):
    config = settings(shots=4, shots_from=solved)
    shots = worked_shots(config, [Problem("a", "math", "1+1?", "2")])
    assert [asked for asked, _ in shots] == ["3 and 3?", "5 and 5?", "8 and 8?", "10 and 10?"]
    assert shots[0][1] == "3+3\nThe answer is $\\boxed{6}$."
    with pytest.raises(UserError, match=r"10 worked examples .* fewer than shots=11"):
        worked_shots(settings(shots=11, shots_from=solved), [Problem("a", "math", "1+1?", "2")])
    with pytest.raises(UserError, match="name one with --shots-from"):
        worked_shots(settings(shots=1), [Problem("a", "math", "1+1?", "2")])


def test_a_base_model_stops_at_the_next_question(settings, scripted, solved, tokenizer, monkeypatch):
    """And what it says after that is not graded."""
    monkeypatch.setattr(tokenizer, "chat_template", None)
    monkeypatch.setattr("pipeline.evaluation.evaluate.context_of", lambda path: 1000)
    engines = scripted(lambda question, sample: " The answer is 2.\n\nQuestion: 9\nAnswer: The answer is 9.")
    got = evaluate(settings(shots=2, shots_from=solved, samples=1))
    assert got["template"] == "qa+raw" and engines[0].calls[0][1].stop == ("\nQuestion:",)
    first, code = rows_of(settings().out)[0], rows_of(settings().out)[-1]
    assert first["prompt"].endswith("\\boxed{16}$.\n\nQuestion: 1+1?\nAnswer:")
    assert (first["text"], first["verdict"]) == (" The answer is 2.\n", "correct")
    assert code["prompt"] == "f is 2", "programs have no worked examples"
    record = json.loads((settings().out / "inputs.json").read_text())
    assert record["inputs"]["shots"] == 2 and len(record["inputs"]["shots_sha256"]) == 64
    with pytest.raises(UserError, match="shots 2, not 3"):
        evaluate(settings(shots=3, shots_from=solved, samples=1))
    with pytest.raises(UserError, match="does not mark where a question begins"):
        out = settings().out.with_name("raw")
        evaluate(settings(shots=2, shots_from=solved, samples=1, template="raw", out=out))


def test_a_chat_model_has_them_as_earlier_turns(settings, scripted, solved, monkeypatch):
    monkeypatch.setattr("pipeline.evaluation.evaluate.context_of", lambda path: 1000)
    engines = scripted(lambda question, sample: "\\boxed{2}")
    evaluate(settings(shots=1, shots_from=solved, samples=1, limit=1))
    assert engines[0].calls[0][1].stop == (), "a turn ends by itself"
    shot = f"{BOS}{USER}3 and 3?\n{BOXED}{ASSISTANT}3+3\nThe answer is $\\boxed{{6}}$.{EOS}"
    assert rows_of(settings().out)[0]["prompt"].startswith(shot)


@pytest.mark.parametrize("name, other", [("gsm8k", "gsm8k_train"), ("math500", "math_train")])
def test_a_benchmark_has_its_own_training_set(settings, name, other):
    try:
        data.rows(other)
    except UserError as missing:
        pytest.skip(str(missing))
    config = settings(benchmark=name, shots=4, data=data.FOLDER, limit=20)
    shots = worked_shots(config, problems(name, count=20, data_dir=data.FOLDER))
    known = {row["problem"].strip(): row["answer"] for row in data.rows(other)}
    assert len({asked for asked, _ in shots}) == 4
    assert all("\\boxed{" in text and "<<" not in text and asked in known for asked, text in shots)


# ---- labels


SHAPES = [
    ({"subject": "Algebra", "level": 3}, {"subject": "Algebra", "level": "3"}),  # MATH-500
    ({"type": "Geometry", "level": "Level 5"}, {"subject": "Geometry", "level": "5"}),  # MATH
    ({"difficulty": 5.0, "family": float("nan")}, {"level": "5"}),  # a table's numbers, one missing
    ({"subfield": "Combinatorics", "subject": "Math", "difficulty": "Competition"},
     {"subject": "Combinatorics", "level": "Competition"}),  # OlympiadBench
    ({"original_id": 17, "instance": 3}, {"family": "17"}),  # GSM-Symbolic
    ({"subject": None, "level": "", "family": ["a"]}, {}),
]  # fmt: skip


@pytest.mark.parametrize("keys, want", SHAPES)
def test_labels_of_public_shapes(tmp_path, keys, want):
    file = write(tmp_path / "p.jsonl", [{"problem": "1+1?", "answer": "2", **keys}])
    assert dict(problems(file)[0].labels) == want


def test_labels_by_fields_and_of_generators(tmp_path, settings):
    file = write(
        tmp_path / "p.jsonl", [{"problem": "1+1?", "answer": "2", "meta": {"kind": "sums", "of": 4}}]
    )
    rows = settings(fields="subject=meta.kind,level=meta.of,family=meta.of")
    assert problems(file, rows=rows)[0].labels == {"subject": "sums", "level": "4", "family": "4"}
    assert {p.labels["subject"] for p in problems("generator:tiny", count=40)} > {"sum", "word"}
    assert "labels" not in repr(Problem("a", "math", "q", labels={"subject": "x"})), (
        "the hash of old runs holds"
    )


def test_labels_survive_a_checkpoint():
    problem = Problem("a", "math", "q", "1", labels={"subject": "x", "level": "2"})
    graded = Graded(Rollout(Prompt(problem, "raw", (1,)), 0, 0, (1,), (0.0,), "stop"), "t")
    back = Round.from_plain(Round((graded,), 1, 1).plain())
    assert back.graded[0].rollout.prompt.problem == problem


def test_scores_by_subject_and_level(settings, scripted, tmp_path):
    labels = [("sums", 10), ("sums", 2), ("sums", 2), ("words", 2), (None, None)]
    rows = [
        {"id": str(i), "problem": f"{i}?", "answer": str(i % 2), "subject": s, "level": level}
        for i, (s, level) in enumerate(labels)
    ]
    scripted(lambda question, sample: f"The answer is {sample}.")
    got = evaluate(settings(benchmark=write(tmp_path / "p.jsonl", rows), samples=2))
    assert {name: (part["pass@1"], part["n"]) for name, part in got["by_subject"].items()} == {
        "sums": (0.5, 3), "words": (0.5, 1),
    }  # fmt: skip
    assert [(name, part["n"]) for name, part in got["by_level"].items()] == [("2", 3), ("10", 1)]
    low, high = got["by_subject"]["words"]["interval"]
    assert 0 < low < 0.5 < high < 1


# ---- the training corpus


LONG = "A farmer has {} hens and sells {} eggs a day at the market in town for two dollars each; what does he"
LONG += " earn in a week if he keeps one egg of every ten for himself and his family?"


@pytest.fixture
def contaminated(tmp_path):
    questions = [
        "What is 1+1?",
        LONG.format(3, 12),
        "Something that no corpus has ever held in any form, is it?",
    ]
    rows = [{"id": str(i), "problem": q, "answer": "2"} for i, q in enumerate(questions)]
    corpus = [
        {"question": "what is $1+1$", "completion": "2"},
        {"messages": [{"role": "user", "content": f"Hear. {LONG.format(3, 99)}"}, {"role": "assistant"}]},
        {"question": LONG.format(7, 99).replace("farmer", "man"), "completion": "x"},
    ]  # fmt: skip
    return write(tmp_path / "p.jsonl", rows), write(tmp_path / "corpus.jsonl", corpus)


def test_copies_of_the_corpus_are_counted_and_scored_apart(settings, scripted, contaminated):
    benchmark, corpus = contaminated
    engines = scripted(lambda question, sample: "The answer is 2." if question.startswith("W") else "3")
    got = evaluate(settings(benchmark=benchmark, corpus=(corpus,), samples=1))
    notes = got["contamination"]
    assert (notes["copies"], notes["near_copies"], notes["corpus_rows"]) == ([0], [1], 3)
    assert (notes["without_copies"]["pass@1"], notes["without_copies"]["n"]) == (0, 1)
    assert got["pass@1"] == pytest.approx(1 / 3)
    again = evaluate(settings(benchmark=benchmark, corpus=(corpus,), samples=1))
    assert again == got and len(engines) == 1


def test_another_corpus_is_another_note_and_no_other_completion(settings, scripted, contaminated):
    benchmark, corpus = contaminated
    engines = scripted(lambda question, sample: "The answer is 2.")
    assert "contamination" not in evaluate(settings(benchmark=benchmark, samples=1))
    before = (settings().out / "generations.jsonl").read_bytes()
    got = evaluate(settings(benchmark=benchmark, corpus=(corpus,), samples=1))
    assert got["contamination"]["near_copies"] == [1] and len(engines) == 1
    assert (settings().out / "generations.jsonl").read_bytes() == before
    assert "contamination" not in evaluate(settings(benchmark=benchmark, samples=1)) and len(engines) == 1


def test_another_corpus_is_no_score_of_fewer_questions(settings, scripted, contaminated):
    """Rows that were lost since: named, where two of three questions would give a score too."""
    benchmark, corpus = contaminated
    scripted(lambda question, sample: "The answer is 2.")
    evaluate(settings(benchmark=benchmark, samples=1))
    rows = (settings().out / "generations.jsonl").read_text().splitlines(keepends=True)
    for left in (rows[:2], rows[:1] + rows[2:], rows[::-1][:2]):
        (settings().out / "generations.jsonl").write_text("".join(left))
        with pytest.raises(UserError, match="2 rows, which are not 1 samples of each of 3 questions"):
            evaluate(settings(benchmark=benchmark, corpus=(corpus,), samples=1))


def test_a_corpus_that_cannot_be_read_is_named(settings, scripted, tmp_path, capsys):
    engines = scripted(lambda question, sample: "2")
    empty = write(tmp_path / "empty.jsonl", [])
    for corpus, words in [
        (str(tmp_path / "none.jsonl"), "none.jsonl"),
        (empty, "empty.jsonl has no rows"),
        (write(tmp_path / "bad.jsonl", [{"text": None}] * 9), "bad.jsonl"),
        ("reject", "unknown problem set 'reject'"),
    ]:
        config = settings(corpus=(corpus,))
        argv = ["--model", str(config.model), "--benchmark", config.benchmark, "--out", str(config.out)]
        assert main(["evaluate", *argv, "--corpus", corpus]) == 2
        assert words in capsys.readouterr().err
    assert not engines and not settings().out.exists()
