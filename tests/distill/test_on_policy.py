"""The stage at micro size: a student moves towards its teacher, the same after a kill, or is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from distill.on_policy import Student
from pipeline.__main__ import main
from pipeline.run.directory import open_run
from pipeline.settings.common import OptimSettings
from pipeline.settings.rollouts import OnPolicySettings
from pipeline.table import STAGES
from rollout.text.tokenizer import train_tokenizer
from tests.small import llama, random_policy

STAGE = next(stage for stage in STAGES if stage.name == "on_policy")


@pytest.fixture(scope="module")
def teacher(tokenizer, tmp_path_factory):
    """A native model with sharp choices, of another width than its student's."""
    return random_policy(tmp_path_factory.mktemp("teacher"), tokenizer, "r1", initializer_range=0.1)


def dense(folder: Path, tokenizer, **changes) -> Path:
    net: LlamaForCausalLM = llama(
        vocab_size=len(tokenizer), max_position_embeddings=256, eos_token_id=tokenizer.eos_token_id, **changes
    )
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def student(tokenizer, tmp_path_factory):
    return dense(tmp_path_factory.mktemp("student"), tokenizer)


@pytest.fixture
def go(teacher, student, tmp_path):
    """`go(name, *flags)`: exit code and folder of the stage."""

    def run(name: str, *flags: object) -> tuple[int, Path]:
        argv = ["on_policy", "--config", "configs/micro/on_policy.toml", "--runs", tmp_path, "--name", name]
        argv += ["--init-from", student, "--teacher", teacher, "--threads", 1, *flags]
        return main(list(map(str, argv))), tmp_path / name / "on_policy"

    return run


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def same_bits(one: Path, two: Path) -> bool:
    a, b = weights(one), weights(two)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
def test_the_student_moves_towards_its_teacher(go, divergence):
    flags = ("--steps", 20, "--max-tokens", 12, "--optim.lr", "2e-2", "--eval-every", 0)
    code, folder = go(divergence, "--divergence", divergence, *flags)
    rows = metrics(folder)
    assert code == 0 and rows[-1]["loss/divergence"] < 0.7 * rows[0]["loss/divergence"]
    assert all(row["policy/mismatch_kl"] < 1e-9 for row in rows)


def test_a_run_leaves_its_record_and_a_model_that_says_what_it_took(go):
    code, folder = go("one")
    assert code == 0
    rows = metrics(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "heldout/pass@1" in row] == [1, 2, 4]
    sampled = [row["rollout/tokens_mean"] * 16 for row in rows]
    assert rows[-1]["data/sampled"] == pytest.approx(sum(sampled))
    assert rows[-1]["data/tokens"] > rows[-1]["data/sampled"]  # prompts are trained through, too
    tokens = json.loads((folder / "model/pipeline.json").read_text())["tokens"]
    assert tokens == {"sampled": rows[-1]["data/sampled"], "trained": rows[-1]["data/tokens"]}
    shown = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(shown) == 4 * 16 and {"text", "verdict", "parts", "tokens"} <= shown[0].keys()
    inputs = json.loads((folder / "env.json").read_text())["inputs"]
    assert len([name for name in inputs if Path(name).is_dir()]) == 2  # student and teacher, by hash


def test_a_learning_rate_of_nothing_changes_nothing(go, student):
    """The divergence of the same student differs from round to round by its samples alone, and so little."""
    code, folder = go("flat", "--steps", 6, "--optim.lr", "1e-30", "--optim.weight-decay", 0)
    found, before = (
        [row["loss/divergence"] for row in metrics(folder)],
        load_file(student / "model.safetensors"),
    )
    assert code == 0 and max(found) - min(found) < 0.1 * min(found)
    assert all(torch.equal(before[name], value) for name, value in weights(folder).items())


def test_a_killed_run_resumes_to_the_same_bits(go, tmp_path):
    """Killed between the checkpoint of step 2 and its end; with Ctrl-C after step 3, too."""
    _, whole = go("whole")
    for name, how in (("killed", signal.SIGKILL), ("interrupted", signal.SIGINT)):
        pid = os.fork()
        if not pid:
            from pipeline.run.directory import RunDir

            log = RunDir.log

            def logged(run_dir, step, total, row, log=log, how=how):
                log(run_dir, step, total, row)
                if step == 3:
                    os.kill(os.getpid(), how)

            RunDir.log = logged
            os._exit(go(name)[0])
        status = os.waitpid(pid, 0)[1]
        assert os.waitstatus_to_exitcode(status) == (130 if how == signal.SIGINT else -9)
        code, folder = go(name, "--resume")
        assert code == 0 and same_bits(whole, folder)
        timed = ("time/", "memory/")
        one, two = (
            [{k: v for k, v in row.items() if not k.startswith(timed)} for row in metrics(f)]
            for f in (whole, folder)
        )
        assert one == two


# ---- the loss of a step


@pytest.fixture
def trainer(teacher, student, tmp_path):
    """`trainer(**settings)`: a stage that has been opened and not begun."""
    opened = []

    def make(**settings):
        config = OnPolicySettings(
            **{
                "runs": tmp_path, "name": f"run{len(opened)}", "init_from": str(student),
                "teacher": str(teacher), "problems": ("generator:sum",), "pool": 6, "eval_every": 0,
                "prompts_per_step": 6,
                "group_size": 2, "max_tokens": 16, "threads": 1, "optim": OptimSettings(lr=1e-3), **settings,
            }
        )  # fmt: skip
        run = open_run(STAGE, config, "make on_policy")
        opened.append((run, Student(config, run.__enter__())))
        return opened[-1][1]

    yield make
    for run, made in opened:
        made.close()
        run.__exit__(None, None, None)


def test_the_loss_is_the_mean_over_tokens_whatever_the_packing(trainer):
    """Against both models' logits a rollout at a time; gradients, too."""
    it = trainer()
    graded = it.source.collect(0, it.sampling(1)).graded
    total, tokens = torch.zeros(()), 0
    for g in graded:
        ids = torch.tensor([[*g.rollout.prompt.token_ids, *g.rollout.token_ids]])
        n = len(g.rollout.token_ids)
        s = it.policy.logits(ids)[0, -n - 1 : -1].log_softmax(1)
        t = it.teacher.logits(ids)[0, -n - 1 : -1].log_softmax(1)
        total, tokens = total + (s.exp() * (s - t)).sum(), tokens + n
    (total / tokens).backward()
    want = {name: p.grad.clone() for name, p in it.policy.named_parameters()}
    found = []
    for micro_tokens in (1, 60, 10_000):
        it = trainer(micro_tokens=micro_tokens)
        stepped = {}
        it.learner.adamw.step = lambda it=it, into=stepped: into.update(
            {name: p.grad.clone() for name, p in it.policy.named_parameters()}
        )
        it.learner.optim = dataclasses.replace(it.learner.optim, clip=0.0)
        found.append(it.update(it.batches(graded))["loss/divergence"])
        for name, gradient in want.items():
            torch.testing.assert_close(stepped[name], gradient, rtol=1e-3, atol=1e-6)
    assert found == pytest.approx([(total / tokens).item()] * 3, rel=1e-6)


def test_the_teacher_is_never_trained_and_scores_the_students_own_ids(trainer):
    it = trainer()
    before = {name: p.clone() for name, p in it.teacher.named_parameters()}
    it.step(1)
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in it.teacher.named_parameters())


# ---- bad input


def refused(capsys, code: int) -> str:
    said = capsys.readouterr().err.strip()
    assert code == 2 and len(said.splitlines()) == 1 and "Traceback" not in said
    return said


def test_a_teacher_of_another_tokenizer_is_refused_by_token(go, tmp_path, capsys):
    tokenizer = train_tokenizer(["entirely other words, some of them rare: zyzzyva"] * 20, vocab_size=330)
    other = random_policy(tmp_path / "other", tokenizer, "r1")
    said = refused(capsys, go("a", "--teacher", other)[0])
    assert "has another tokenizer: token" in said and "make distill" in said


def test_a_head_that_is_smaller_than_the_students_is_refused(go, tokenizer, tmp_path, capsys):
    """Padding of the vocabulary: the student's ids above the teacher's have no probability there."""
    padded = dense(tmp_path / "padded", tokenizer)
    net = LlamaForCausalLM.from_pretrained(padded)
    net.resize_token_embeddings(len(tokenizer) + 8)
    net.save_pretrained(padded)
    assert "only" in refused(capsys, go("a", "--init-from", padded)[0])
    assert go("b", "--teacher", padded, "--steps", 1)[0] == 0  # the other way round it is left out


def test_a_teacher_that_is_not_there_is_refused_with_the_way_to_it(go, tmp_path, capsys):
    assert "make it first: make grpo2" in refused(capsys, go("a", "--teacher", "grpo2")[0])
    assert "no model at" in refused(capsys, go("b", "--teacher", tmp_path / "nowhere")[0])
    said = refused(capsys, go("c", "--init-from", "distill/student")[0])
    assert "distill/student/model; make it first: make distill" in said
    assert "divergence" in refused(capsys, go("d", "--divergence", "kl")[0])
    assert "beta" in refused(capsys, go("e", "--beta", "1")[0])


def test_questions_beyond_the_teachers_context_are_left_out(go, tokenizer, tmp_path, capsys):
    short = random_policy(tmp_path / "short", tokenizer, "r1", max_position_embeddings=24)
    assert "the model's context of 24 tokens" in refused(capsys, go("a", "--teacher", short)[0])
