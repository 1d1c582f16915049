"""`compare` and `leaderboard` on folders with known verdicts."""

from __future__ import annotations

import json
import re

import pytest

from pipeline.__main__ import main
from pipeline.evaluation.compare import LONGEST
from pipeline.evaluation.intervals import difference_interval, wilson
from tests.pipeline.evaluation.made_up import evaluation, row

PLAIN = [[i < 19] for i in range(40)]
BETTER = [[not 16 <= i < 19 and i < 28] for i in range(40)]  # 3 lost, 9 gained


@pytest.fixture
def run(capsys):
    """Exit code, stdout and stderr of a command line."""

    def go(*argv: object) -> tuple[int, str, str]:
        code = main([str(arg) for arg in argv])
        out, err = capsys.readouterr()
        return code, out, err

    return go


def test_one_sample_is_mcnemars_test_and_the_last_line_is_the_contract(tmp_path, run):
    a, b = evaluation(tmp_path / "a", PLAIN), evaluation(tmp_path / "b", BETTER)
    code, out, err = run("compare", a, b)
    result = json.loads(out.splitlines()[-1])
    assert (code, err) == (0, "")
    assert list(result) == ["n", "a", "b", "difference", "interval", "p_value", "changed"]
    assert (result["n"], result["changed"]) == (40, 12)
    assert (result["a"], result["b"], result["difference"]) == (19 / 40, 25 / 40, 6 / 40)
    assert result["p_value"] == pytest.approx(0.14599609375), "statsmodels' mcnemar(3, 9)"
    assert result["interval"] == pytest.approx(difference_interval([-1.0] * 3 + [1.0] * 9 + [0.0] * 28))
    low, high = (f"{100 * bound:.1f}" for bound in wilson(19, 40))
    assert f"{low} to {high}" in out and "B - A = +15.0 points" in out and "p = 0.15: no difference" in out
    lines = [line.strip() for line in out.splitlines() if " -> " in line]
    assert lines[0] == "right -> wrong  q-16: What is 16?" and lines[-1].startswith("wrong -> right  q-27")
    back = json.loads(run("compare", b, a)[1].splitlines()[-1])
    assert back["difference"] == -6 / 40 and back["p_value"] == result["p_value"]
    assert back["interval"] == pytest.approx([-x for x in reversed(result["interval"])])


def test_several_samples_are_compared_by_question(tmp_path, run):
    a = evaluation(tmp_path / "a", [[True] * 2 + [False] * 2] * 8)
    b = evaluation(tmp_path / "b", [[False] * 2 + [True] * 2] * 6 + [[True] * 4, [True, True, True, False]])
    result = json.loads(run("compare", a, b)[1].splitlines()[-1])
    assert result["changed"] == 2 and result["difference"] == pytest.approx(3 / 32)
    assert result["p_value"] == 0.5, "of the four patterns of signs of 2 and 1 two are as far as 3"


def test_families_are_one_comparison_each(tmp_path, run):
    names = [f"f{i // 5}" for i in range(40)]
    won = [[i < 30] for i in range(40)]
    none = [[i >= 38] for i in range(40)]
    alone = [evaluation(tmp_path / "alone" / name, of) for name, of in (("a", none), ("b", won))]
    tied = [evaluation(tmp_path / "tied" / name, of, names) for name, of in (("a", none), ("b", won))]
    free, grouped = (json.loads(run("compare", *of)[1].splitlines()[-1]) for of in (alone, tied))
    assert free["p_value"] < 1e-6 and grouped["p_value"] == pytest.approx(4 / 2**7), "5 six times, and -2"
    assert grouped["interval"][0] < free["interval"][0] < 0.7


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"benchmark": "more", "problems_sha256": "00"}, "has sums, 40 questions; "),
        ({"problems_sha256": "00"}, "at first in question 2"),
        ({}, "has 1 samples a problem"),
    ],
)
def test_what_is_not_comparable_is_refused_by_name(tmp_path, run, other, says):
    a = evaluation(tmp_path / "a", PLAIN)
    b = evaluation(tmp_path / "b", PLAIN if other else [[True, False]] * 40, **other)
    if "benchmark" not in other and other:
        text = (b / "generations.jsonl").read_text()
        (b / "generations.jsonl").write_text(text.replace("What is 2?", "What is two?"))
    code, _, err = run("compare", a, b)
    assert code == 2 and says in err and err.count("\n") == 1, err


def test_what_differs_beside_the_model_is_said(tmp_path, run):
    a = evaluation(tmp_path / "a", PLAIN)
    graded = {"graded_again": {"mode": "strict", "changed": 0}}
    b = evaluation(tmp_path / "b", PLAIN, template_hash="ef" * 32, max_tokens=64, top_k=5, **graded)
    _, out, _ = run("compare", a, b)
    assert "other grading: lenient in A" in out and "other top_k: 0 in A" in out
    assert "other template: cdcdcdcd in A" in out and "other max_tokens: 256 in A" in out
    result = json.loads(out.splitlines()[-1])
    assert (result["p_value"], result["changed"]) == (1.0, 0) and result["interval"][0] < 0


def test_the_page_has_both_transcripts_of_what_changed_and_escapes_them(tmp_path, run):
    a, b = evaluation(tmp_path / "a", PLAIN), evaluation(tmp_path / "b", BETTER)
    rows = (b / "generations.jsonl").read_text().splitlines()
    rows[16] = json.dumps(row(16, 0, False, text="x" * (LONGEST + 70) + "the end"))
    (b / "generations.jsonl").write_text("\n".join(rows) + "\n")
    assert run("compare", a, b, "--out", tmp_path / "page.html")[0] == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count("<details>") == page.count("</details>") == 12
    assert page.count("✓ right") == page.count("✗ wrong") == 12
    assert "I think &lt;b&gt;27&lt;/b&gt;" in page and "<b>27</b>" not in page
    assert "[… 77 characters …]" in page and "the end" in page
    assert not re.search(r'(?:src|href)="?https?:|<script', page), "no network, no script"
    assert page.index("What is 16?") < page.index("What is 19?"), "what was lost comes first"


def test_the_leaderboard_has_everything_below_a_folder(tmp_path, run):
    top = tmp_path / "runs"
    evaluation(top / "one/eval/base/sums", PLAIN)
    evaluation(top / "one/eval/r1/sums", BETTER, template_hash="ef" * 32)
    evaluation(top / "two/aime", [[True, False]] * 30, benchmark="aime24", shots=3)
    (top / "one/eval/scores.json").write_text('{"models": {}, "scores": {}}')
    evaluation(top / "three", PLAIN)
    (top / "three/scores.json").unlink()
    evaluation(top / "four", PLAIN)
    (top / "four/scores.json").write_text("{")
    code, out, _ = run("leaderboard", top, "--out", tmp_path / "page.html", "--json", tmp_path / "all.json")
    assert code == 0 and json.loads(out.splitlines()[-1]) == {"evaluations": 3, "left_out": 2}
    assert out.index("one/eval/r1/sums") < out.index("one/eval/base/sums"), "the best first"
    assert "three is not finished" in out and "four/scores.json is damaged" in out
    assert (
        "not comparable, other template: efefefef in one/eval/r1/sums; cdcdcdcd in one/eval/base/sums" in out
    )
    page = (tmp_path / "page.html").read_text()
    assert all(text in page for text in ("62.5 %", "47.5 %", "three is not finished", "efefefef"))
    models = json.loads((tmp_path / "all.json").read_text())
    assert set(models) == {"models/sums", "models/aime"}
    aime = models["models/aime"]
    assert aime["results"]["aime24"]["exact_match,none"] == 0.5
    assert aime["results"]["aime24"]["pass@k,none"] == 1.0
    assert aime["results"]["aime24"]["exact_match_stderr,none"] == pytest.approx(0.0, abs=1e-12)
    assert aime["n-samples"] == {"aime24": {"original": 30, "effective": 30}} and aime["n-shot"] == {
        "aime24": 3
    }
    assert aime["higher_is_better"]["aime24"]["exact_match"] is True
    twice = models["models/sums"]["results"]
    assert set(twice) == {"sums", "sums@one/eval/base/sums"} and twice["sums"]["exact_match,none"] == 0.625
    assert twice["sums"]["exact_match_stderr,none"] == pytest.approx((0.625 * 0.375 / 39) ** 0.5)


def test_a_folder_without_evaluations_is_refused(tmp_path, run):
    code, _, err = run("leaderboard", tmp_path)
    assert code == 2 and "no evaluation lies below" in err
    a = evaluation(tmp_path / "r1/sums", PLAIN)
    code, _, err = run("compare", a, tmp_path / "r1")
    assert code == 2 and f"name one of {a}" in err, "the folder of several benchmarks names them"
