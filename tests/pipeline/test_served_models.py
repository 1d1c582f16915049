"""Served models through the commands: evaluate, generate and reject over an API, and what a fault leaves."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.data.corpus import read_corpus
from pipeline.run.directory import RunDir
from tests.fake_endpoint import FakeEndpoint, chat, error, running
from tests.small import random_policy

SUMS = [{"question": f"{n}+{n}=?", "answer": str(2 * n)} for n in range(1, 7)]


def solve(body, n):
    """The right answer, worked in a think block of the server's own; a copy where the seed is even."""
    question = body["messages"][0]["content"].partition("=")[0]
    right = sum(map(int, question.split("+")))
    return chat(f"So it is $\\boxed{{{right}}}$.", reasoning_content=f"Add {question}, way {body['seed']}.")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working directory, with problems, and no wait between repetitions."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("R1_DATA", str(tmp_path))
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.0)
    Path("sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SUMS))
    Path("math500.jsonl").write_text(json.dumps({"problem": "3 + 3 = ?", "answer": "6"}) + "\n")
    Path("reject.toml").write_text(
        'problems = ["sums.jsonl"]\nsamples = 3\nkeep = 2\ngeneral = 1\ntemplate = "boxed"\nthreads = 1\n'
        'heldout = ["math500"]\nprompts_per_step = 2\n'
        '[rollout]\nengine = "endpoint"\n[rollout.endpoint]\nretries = 0\n'
    )
    return tmp_path


@pytest.fixture
def serve(here, monkeypatch):
    """`serve(says)`: a context in which the environment names a fake API."""

    def begin(says):
        fake = FakeEndpoint(says)
        context = running(fake)
        monkeypatch.setenv("OPENAI_BASE_URL", context.__enter__())
        contexts.append(context)
        return fake

    contexts: list = []
    yield begin
    for context in contexts:
        context.__exit__(None, None, None)


REJECT = "reject --config reject.toml --init-from org/teacher"


def test_reject_keeps_what_a_served_teacher_solves_and_describes_it(serve, here, capsys):
    fake = serve(solve)
    assert main(REJECT.split()) == 0
    folder = here / "runs/tiny/reject"
    rows = [row for row in read_corpus(folder / "corpus.jsonl") if row.source != "generator:general"]
    assert [row.question for row in rows] == [f"{n}+{n}=?" for n in (1, 1, 2, 2, 4, 4, 5, 5, 6, 6)]
    assert (
        rows[0].completion.startswith("<think>\nAdd 1+1, way ") and rows[0].answer == "So it is $\\boxed{2}$."
    )
    assert len({row.completion for row in rows}) == 10 and len(fake.bodies) == 15
    assert {b["model"] for b in fake.bodies} == {"org/teacher"}
    assert fake.bodies[0]["messages"][0]["content"].endswith("within \\boxed{}.")
    out = capsys.readouterr().out
    assert "reject: left out: 1 of" in out and "completion, characters: mean " in out
    card = (folder / "README.md").read_text()
    for part in (
        "language: [en", "size_categories: [n<1K]", "data_files: corpus.jsonl", "| problems | 5 |",
        "| benchmarks | 1 of 6 problems hold one of math500 |", "org/teacher, served at http://127.0.0.1",
        'problems = [\n    "sums.jsonl",\n]', "samples = 3\n",
        "| kept | 10 |", "| more than keep | 5 |", "| source reject:sums | 10 |", "| kind math | ",
    ):  # fmt: skip
        assert part in card, (part, card)
    sizes = sorted(len(row.completion) for row in read_corpus(folder / "corpus.jsonl"))
    assert (
        f"| completion, characters | {round(sum(sizes) / 11)} | {sizes[5]} | {sizes[9]} | {sizes[10]} |"
        in card
    )
    assert "tokens |" not in card.partition("| length |")[2], "the teacher's tokenizer is not known"


def test_the_card_counts_each_filter(serve, here):
    replies = {
        "1": chat("3", reasoning="no"), "2": chat("<think>\na\na\n</think>\n\\boxed{4}"),
        "4": chat("\\boxed{8}"),
        "5": chat("\\boxed{10}", reasoning="Fine."), "6": chat("\\boxed{12}", reasoning="不是英文的话"),
    }  # fmt: skip
    serve(lambda body, n: replies[body["messages"][0]["content"][0]])
    assert main(REJECT.split()) == 0
    card = (here / "runs/tiny/reject/README.md").read_text()
    for line in (
        "wrong | 3", "not readable | 3", "not in format | 3", "kept | 1", "repeated | 2",
        "in another language | 3",
    ):  # fmt: skip
        assert f"| {line} |" in card, (line, card)


def files(folder):
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    card = (folder / "README.md").read_text().partition("## Settings")[0].splitlines()
    return (folder / "corpus.jsonl").read_bytes(), rows, [line for line in card if "| run with |" not in line]


def test_a_quota_that_runs_out_costs_the_step_and_resume_goes_on(serve, here, capsys, monkeypatch):
    fake = serve(solve)
    assert main([*REJECT.split(), "--name", "other"]) == 0
    fake.says = lambda body, n: (
        error(429, "no more", code="insufficient_quota") if n >= 15 + 8 else solve(body, n)
    )
    assert main(REJECT.split()) == 2
    said = capsys.readouterr().err
    assert "quota is used up: " in said and "--resume" in said and said.count("\n") == 1
    assert (here / "runs/tiny/reject/latest").read_text() == "checkpoint-1\n"
    asked, fake.says = len(fake.bodies), solve
    assert main([*REJECT.split(), "--resume"]) == 0
    assert len(fake.bodies) - asked == 15 - 6, "the first step was not sampled again"
    whole, again = (files(here / "runs" / name / "reject") for name in ("other", "tiny"))
    assert whole == again and "| kept | 10 |" in whole[2]


def test_reject_counts_failing_steps_over_a_resume(serve, here, monkeypatch, capsys):
    """Two failing steps in a row stop it, also where one was before the resume."""
    serve(solve)
    monkeypatch.setattr("pipeline.train.rollouts.error_share", lambda graded: (0.9, "made"))
    log = RunDir.log

    def stop_after_one(self, step, *rest):
        log(self, step, *rest)
        self.interrupted = step == 1

    monkeypatch.setattr(RunDir, "log", stop_after_one)
    assert main(REJECT.split()) == 130
    assert main([*REJECT.split(), "--resume"]) == 3
    assert "of 2 steps in a row" in capsys.readouterr().err
    assert '"step": 2' in Path("runs/tiny/reject/metrics.jsonl").read_text().splitlines()[-1], "not one later"


def test_nothing_kept_says_what_became_of_it(serve, here, capsys):
    serve(lambda body, n: chat("no idea", "length"))
    assert main(REJECT.split()) == 2
    said = capsys.readouterr().err
    assert "kept nothing of 5 problems (15 wrong)" in said and "--template" in said
    Path("math500.jsonl").write_text(Path("sums.jsonl").read_text())
    assert main([*REJECT.split(), "--name", "b"]) == 2
    assert "all 6 of 6 problems hold one of math500" in capsys.readouterr().err


def test_benchmarks_that_cannot_be_read_are_named_and_the_run_goes_on(serve, here, capsys):
    serve(solve)
    assert main([*REJECT.split(), "--heldout", "math500", "nonsense", "aime24"]) == 0
    said = capsys.readouterr().out
    assert (
        "1 of 6 problems hold one of math500; not compared with nonsense (unknown problem set 'nonsense'"
        in said
    )
    assert "; not compared with aime24 (" in said


EVALUATE = (
    "evaluate --model org/m --engine endpoint --benchmark sums.jsonl --samples 2 --out scores --threads 1"
)


def test_evaluate_scores_a_served_model(serve, here, capsys):
    fake = serve(solve)
    assert main([*EVALUATE.split(), "--max-batch", "1"]) == 0
    scores = json.loads((here / "scores/scores.json").read_text())
    assert (scores["pass@1"], scores["n"], scores["model_hash"]) == (1.0, 6, "endpoint:org/m")
    assert fake.most_at_once == 1 and scores["mean_tokens"] == 7
    rows = [json.loads(line) for line in (here / "scores/generations.jsonl").read_text().splitlines()]
    assert rows[0]["text"].startswith("<think>\nAdd 1+1, way ") and rows[0]["extracted"] == "2"
    asked = len(fake.bodies)
    assert main(EVALUATE.split()) == 0 and len(fake.bodies) == asked == 12, "the scores in the folder hold"


def test_requests_overlap_whatever_is_saved_together(serve, here):
    """One slow question of twelve: meanwhile all others are asked, and what came before it is saved."""
    seen = []

    def says(body, n):
        if body["messages"][0]["content"].startswith("3+3"):
            began = time.monotonic()
            while len(fake.bodies) < 12 and time.monotonic() < began + 10:
                time.sleep(0.01)
            saved = Path("scores/generations.jsonl").read_text().splitlines()
            seen.append((len(fake.bodies), len(saved)))
        return solve(body, n)

    fake = serve(says)
    assert main([*EVALUATE.split(), "--save-every", "2", "--endpoint.in-flight", "3"]) == 0
    assert max(seen) == (12, 4)


def test_what_was_sampled_is_kept_question_by_question(serve, here, capsys):
    """A server fails in the middle, and another goes on: that is recorded."""
    one = [*EVALUATE.split(), "--endpoint.in-flight", "1", "--endpoint.retries", "0"]
    fake = serve(lambda body, n: error(500, "broken") if n >= 7 else solve(body, n))
    assert main(one) == 2 and "broken" in capsys.readouterr().err
    assert len(Path("scores/generations.jsonl").read_text().splitlines()) == 6
    again = serve(solve)
    assert main(one) == 0 and len(again.bodies) == 6
    assert "another address than before" in capsys.readouterr().out
    made = json.loads(Path("scores/inputs.json").read_text())["made_with"]
    assert len({m["address"] for m in made}) == 2 and len(fake.bodies) == 8


def test_generate_has_no_token_ids_to_give(serve, here):
    serve(lambda body, n: chat(f"said {body['messages'][0]['content']}"))
    Path("prompts.jsonl").write_text('{"prompt": "hello"}\n')
    line = "generate --model m --engine endpoint --prompts prompts.jsonl --out out.jsonl"
    assert main(line.split()) == 0
    row = json.loads(Path("out.jsonl").read_text())
    assert (row["text"], row["token_ids"], row["logprobs"]) == ("said hello", None, None)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("chat --model m --engine endpoint", "see generate"),
        (f"{EVALUATE} --workers 2", "workers=2 must be 0 with an endpoint"),
        ("serve --model m --engine endpoint --port 0", "see generate"),
        (
            "generate --model m --engine endpoint --prompts ids.jsonl --out o.jsonl",
            "ids.jsonl: engine endpoint takes",
        ),
        ("zero --config empty.toml --init-from policy --rollout.engine endpoint", "no token ids to train on"),
        ("eval --config empty.toml --engine endpoint", "engine=endpoint scores one served model"),
        (f"{REJECT} --rollout.workers 2", "workers=2 must be 0"),
        (f"{REJECT} --rollout.endpoint.in-flight 0", "in_flight=0 must be"),
    ],
)
def test_what_an_endpoint_is_not_for(serve, here, tokenizer, capsys, line, says):
    serve(solve)
    Path("empty.toml").touch()
    Path("ids.jsonl").write_text('{"token_ids": [3, 4]}\n')
    if "policy" in line:
        random_policy(Path("policy"), tokenizer, "r1")
    assert main(line.split()) == 2
    assert says in capsys.readouterr().err


def test_up_makes_no_model_for_a_served_teacher(root, monkeypatch, tmp_path, capsys):
    made = []
    monkeypatch.chdir(root)
    monkeypatch.setattr("pipeline.tools.up.make", lambda steps, jobs: made.extend(steps))
    line = f"up reject --runs {tmp_path} --rollout.engine endpoint --init-from NAME --template boxed"
    assert main(line.split()) == 0
    assert [step.stage.name for step in made] == ["reject"]
    made.clear()
    assert main(f"up reject --runs {tmp_path}".split()) == 0
    assert [step.stage.name for step in made] == ["pretrain", "zero", "sft", "grpo", "reject"]
