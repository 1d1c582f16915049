"""The report of a made-up run: the contract of summary.json, and a page that tells all and trusts no text."""

from __future__ import annotations

import html.parser
import json
import re

import pytest
from made_up_run import CHAIN, NASTY, write

from pipeline.__main__ import main
from pipeline.report.page import origin
from pipeline.report.summary import StageRecord


class Page(html.parser.HTMLParser):
    """Checks that every tag is closed in order, and collects what a browser would show and fetch."""

    VOID = frozenset({"meta", "br", "img", "hr", "input", "link"})

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.links, self.tags, self.classes = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"
        self.shown = " ".join(" ".join(self.text).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.classes += [v for k, v in attrs if k == "class"]
        self.links += [v for k, v in attrs if k in ("src", "href") or (k.startswith("on") and v)]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> while {self.open[-3:]} is open"
        self.open.pop()

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)


@pytest.fixture
def report(tmp_path):
    """`report(*flags)`: the stage on the run `fake`, from the command line."""
    file = tmp_path / "report.toml"
    file.write_text(f'name = "fake"\nruns = "{tmp_path / "runs"}"\n')
    return lambda *flags: main(["report", "--config", str(file), *flags])


def test_summary_is_the_contract(fake_run, report):
    folder = fake_run()
    assert report() == 0
    got = json.loads((folder / "summary.json").read_text())
    assert set(got["models"]) == {label for labels, *_ in CHAIN.values() for label in labels}
    for by_benchmark in got["models"].values():
        assert set(by_benchmark) == {"heldout"}
        keys = {"pass@1", "n", "interval", "format_rate", "language_consistency", "mean_tokens"}
        assert set(by_benchmark["heldout"]) == keys
    r1 = got["models"]["r1"]["heldout"]
    assert r1["pass@1"] == pytest.approx(0.88, abs=0.002) and r1["n"] == 320
    assert r1["interval"][0] < r1["pass@1"] < r1["interval"][1]
    assert got["seconds"] == pytest.approx(sum(c[3] for c in CHAIN.values()) + 12)
    assert got["peak_rss_bytes"] == int(1e9 + 70.5) and got["seed"] == 7
    assert got["not_scored"] == {"math500": "no data folder is set, and the hub cannot be read"}


def test_the_page_tells_the_whole_story(fake_run, report, capsys):
    folder = fake_run()
    assert report() == 0
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith(f"report: {folder / 'report.html'}") and "88.1 %" in printed
    page = Page((folder / "report.html").read_text())
    assert (folder / "report.html").read_bytes() == (folder / "report" / "report.html").read_bytes()
    for words in (
        "R1, end to end: fake", "88.1 %", "5.9 %", "84.1 to 91.2", "student_plain", "6m03s",  # scores, cost
        "reward/accuracy", "heldout/pass@1", "rollout/tokens_mean", "policy/entropy", "reward/language",
        "policy/mismatch_kl", "pretrain: loss", "fine-tuning: loss",  # curves
        "Dev1", "R1-Zero", "kept 59 %", "math500 not scored: no data folder is set",
        "What is 3+4-5?", "✓ right", "✗ wrong",  # transcripts
        "a" * 12, "Imaginary <9000>", "2.13.0", 'stage = "grpo2"', "seed",  # where it comes from
        "greedy accuracy on a slice of the held-out problems", "Wilson",  # glossary
    ):  # fmt: skip
        assert words in page.shown, words
    assert (
        "R1 88.1 % 95 % interval 84 to 91 % student 74.1 % 95 % interval 69 to 79 %; plain 54.1 %"
        in page.shown
    )
    assert "time 6m03s 10 stages peak memory 0.9 GiB of the largest stage" in page.shown
    assert page.classes.count("curve") == 6 * 3 + 3 + 3 + 4 + 1 and page.classes.count("box") >= 16


def test_the_page_is_one_file_and_no_text_becomes_markup(fake_run, report):
    folder = fake_run()
    write(folder / "eval" / "zero" / "heldout" / "generations.jsonl", *[
        {"index": i, "sample": 0, "question": NASTY, "answer": NASTY, "text": f"{NASTY}</think>{NASTY}",
         "verdict": "error", "tokens": 3, "finish_reason": "length", "detail": NASTY} for i in range(12)
    ])  # fmt: skip
    assert report() == 0
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert "script" not in page.tags and "img" not in page.tags and not page.links
    assert not re.search(r"(?:https?:)?//(?!arxiv)", re.sub(r'xmlns(:xlink)?="[^"]*"', "", text)), (
        "nothing is fetched"
    )
    assert page.shown.count("<script>alert('x')</script>") >= 12
    assert "? verifier failed" in page.shown and "3 tokens, cut" in page.shown


def test_thinking_is_set_apart_from_the_answer(fake_run, report):
    folder = fake_run()
    assert report("--transcripts", "12", "--transcript-models", "r1") == 0
    text = (folder / "report.html").read_text()
    assert re.search(
        r'<span class="think">&lt;think&gt;\n3\+4=7\n7-5=2\n&lt;/think&gt;</span>\n&lt;answer&gt;', text
    )
    assert text.count('class="problem"') == 12
    assert report("--transcripts", "0") == 0
    assert "Before and after" not in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    "stages", [("pretrain", "eval"), ("pretrain", "zero", "eval"), ("zero", "distill", "eval")]
)
def test_a_run_that_is_not_finished_has_a_report_too(fake_run, report, stages):
    folder = fake_run(stages=stages)
    (folder / stages[0] / "done.json").unlink()
    assert report() == 0
    page = Page((folder / "report.html").read_text())
    assert "not made yet" in page.shown and "not finished" in page.shown
    assert json.loads((folder / "summary.json").read_text())["stages"][stages[0]]["seconds"] is None


def test_it_may_be_run_again_as_the_run_grows(fake_run, report):
    folder = fake_run(stages=("pretrain", "eval"))
    assert report() == 0
    fake_run()
    assert report() == 0
    assert "r1" in json.loads((folder / "summary.json").read_text())["models"]
    seconds = json.loads((folder / "summary.json").read_text())["seconds"]
    assert report() == 0 and json.loads((folder / "summary.json").read_text())["seconds"] == seconds


def test_without_scores_it_says_what_to_make(fake_run, report, capsys):
    fake_run(stages=("pretrain",))
    assert report() == 2
    assert "make eval ARGS='--name fake'" in capsys.readouterr().err


def test_sampled_benchmarks_show_pass_k_and_prompts_that_were_too_long(fake_run, report):
    folder = fake_run()
    file = folder / "eval" / "scores.json"
    state = json.loads(file.read_text())
    hard = {**state["scores"]["r1"]["heldout"], "k": 4, "pass@k": 0.987, "cons@k": None,
            "prompts_too_long": 3, "mean_tokens": None, "format_rate": None}  # fmt: skip
    state["scores"]["r1"]["aime24"] = hard
    file.write_text(json.dumps(state))
    assert report() == 0
    page = Page((folder / "report.html").read_text())
    assert "98.7 %" in page.shown and "r1 3 of 320" in page.shown and "cons@k" in page.shown
    assert json.loads((folder / "summary.json").read_text())["models"]["r1"]["aime24"]["mean_tokens"] is None


def test_the_origin_names_each_machines_gpu_once():
    gpu = {"name": "NVIDIA H100", "count": 1, "memory_gib": 79.6, "driver": "580.65", "cuda": "13.0"}
    records = [
        StageRecord(name, {}, {"machine": {"cpu": "Imaginary"} | more}, [], {}, 1.0, 1, 0)
        for name, more in (("sft", {"gpu": gpu}), ("grpo", {"gpu": gpu}), ("report", {}))
    ]
    rows = dict(origin(records))
    assert rows["GPU"] == "1 x NVIDIA H100, driver 580.65, CUDA 13.0"
    assert "GPU" not in dict(origin(records[2:]))
