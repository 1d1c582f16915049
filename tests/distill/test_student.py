"""The stage at micro size: students learn, travel, cost the same, and come out the same bits."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
)
from trl import SFTTrainer

from distill.batches import plan
from distill.student import first_weights, lora_config
from distill.trainer import Job, StudentTrainer, arguments
from pipeline.errors import Stopped, UserError
from pipeline.run.directory import RunDir
from pipeline.run.guard import Guard
from pipeline.settings.common import GuardSettings
from pipeline.settings.distill import DistillSettings, StudentOptimSettings
from rollout.text.tokenizer import encode_example, load_tokenizer

Distill = Callable[..., Path]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path, label: str = "student") -> dict[str, torch.Tensor]:
    return load_file(folder / label / "model" / "model.safetensors")


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def stop_after() -> Callable[[int], Callable[[RunDir], None]]:
    """A hook that presses Ctrl-C when line `n` of the log is written."""

    def make(n: int) -> Callable[[RunDir], None]:
        def hook(run_dir: RunDir) -> None:
            log = run_dir.log

            def logged(step: int, total: int, row: dict[str, float]) -> None:
                log(step, total, row)
                if step == n:
                    run_dir.on_sigint(signal.SIGINT, None)

            run_dir.log = logged  # type: ignore[method-assign]

        return hook

    return make


def test_student_and_control_learn_on_equal_budgets_and_load(distill: Distill, toy: Path) -> None:
    folder = distill(steps=90, init_from=str(toy / "start"))
    rows = metrics(folder)
    student, plain = rows[:90], rows[90:]
    assert [row["step"] for row in rows] == list(range(1, 181))
    assert student[-1]["loss/lm"] < 1.5 < 5 < student[0]["loss/lm"]
    assert plain[-1]["loss/lm"] < 1.5 < 5 < plain[0]["loss/lm"]

    trained = [row["time/trained_tokens_per_s"] * row["time/step_s"] for row in student]
    assert sum(trained) == pytest.approx(student[-1]["data/tokens"], rel=1e-3)

    # The same number of updates, and of tokens to within one row, though a plain row is three times shorter.
    assert abs(student[-1]["data/tokens"] - plain[-1]["data/tokens"]) <= 128
    assert abs(student[-1]["data/tokens"] - 90 * 512) <= 128
    assert plain[-1]["data/epoch"] > 2 * student[-1]["data/epoch"]
    assert student[-1]["optim/lr"] == pytest.approx(1e-3, rel=0.1)  # cosine to a tenth

    question, trace = "1+2+3", "<think>\n1+2=3\n3+3=6\n</think>\n<answer>6</answer>"
    for label, template in (("student", "r1"), ("plain", "plain")):
        model = AutoModelForCausalLM.from_pretrained(folder / label / "model")
        tokenizer = AutoTokenizer.from_pretrained(folder / label / "model")
        about = json.loads((folder / label / "model" / "pipeline.json").read_text())
        assert about == {"template": template, "tokens": {"trained": about["tokens"]["trained"]}}
        assert (folder / label / "model" / "README.md").read_text().startswith("# tiny: distilled")
        assert (
            model.config.vocab_size == len(tokenizer) and model.config.eos_token_id == tokenizer.eos_token_id
        )
        completion = trace if label == "student" else "<answer>6</answer>"
        mine = encode_example(tokenizer, question, template, completion)
        theirs = AutoTokenizer.from_pretrained(toy / "start")
        assert mine == encode_example(theirs, question, template, completion)


def test_the_first_loss_is_the_mean_over_completion_tokens(distill: Distill, toy: Path) -> None:
    """Against a loop over rows and tokens on the untrained student."""
    folder = distill(steps=1, plain_control=False, micro_batches=2, max_length=100)
    tokenizer = AutoTokenizer.from_pretrained(toy / "start")
    lines = (toy / "corpus.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    pairs = [encode_example(tokenizer, row["question"], "r1", row["completion"]) for row in rows]
    net = first_weights(DistillSettings(), toy / "start").eval()
    total, count = 0.0, 0
    for batch in plan([len(p) + len(c) for p, c in pairs], 2, 256, seed=0):
        for row in batch:
            prompt, completion = pairs[row]
            with torch.no_grad():
                logits = net(torch.tensor([prompt + completion])).logits[0].double()
            for i, token in enumerate(completion):
                scores = logits[len(prompt) + i - 1]
                total += math.log(scores.exp().sum().item()) - scores[token].item()
                count += 1
    assert metrics(folder)[0]["loss/lm"] == pytest.approx(total / count, rel=1e-4)


def test_same_seed_same_bits(distill: Distill) -> None:
    one, two, three = (distill(name=n, seed=s) for n, s in (("one", 0), ("two", 0), ("three", 1)))
    for label in ("student", "plain"):
        assert same_bits(weights(one, label), weights(two, label))
    assert not same_bits(weights(one), weights(three))


@pytest.mark.parametrize("at", [2, 4, 6, 8, 12])
def test_an_interrupted_run_resumes_to_the_same_bits(
    distill: Distill, stop_after: Callable[[int], Callable[[RunDir], None]], at: int
) -> None:
    """In the middle of the student, of its control, on a checkpoint, and on the last step of each."""
    whole = distill(name="whole", save_every=4)
    with pytest.raises(KeyboardInterrupt, match="--resume"):
        distill(name="cut", save_every=4, hook=stop_after(at))
    cut = distill(name="cut", save_every=4, resume=True)
    for label in ("student", "plain"):
        assert same_bits(weights(whole, label), weights(cut, label))
    told = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in metrics(cut)]
    assert told == [{k: v for k, v in row.items() if not k.startswith("time/")} for row in metrics(whole)]


@pytest.fixture
def unstable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The student's updates 5 and 6 are not finite, unless the rate is lower than that of the settings."""
    real = StudentTrainer.compute_loss

    def loss(self: StudentTrainer, *args: Any, **more: Any) -> Any:
        high = "/student" in self.args.output_dir and self.args.learning_rate > 6e-3
        return real(self, *args, **more) * (math.nan if high and self.state.global_step in (4, 5) else 1.0)

    monkeypatch.setattr(StudentTrainer, "compute_loss", loss)


def test_a_student_that_diverges_goes_back_and_its_control_does_not(
    distill: Distill,
    unstable: None,
    stop_after: Callable[[int], Callable[[RunDir], None]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And the checkpoint of a Ctrl-C, which the rollback could go to, changes no bit."""
    guard = GuardSettings(max_skipped=2)
    through = distill(name="through", save_every=4, guard=guard)
    said = capsys.readouterr().out
    assert "update 5 skipped: its loss or gradient is not finite" in said
    assert "back to step 0, learning rate times 0.5" in said  # no update came after the checkpoint of step 4
    schedule = [row["optim/lr"] for row in metrics(through)]
    assert schedule[:6] == pytest.approx([rate / 2 for rate in schedule[6:]]) and len(schedule) == 12
    with pytest.raises(KeyboardInterrupt):
        distill(name="cut", save_every=4, guard=guard, hook=stop_after(2))
    cut = distill(name="cut", save_every=4, guard=guard, resume=True)
    assert all(same_bits(weights(through, label), weights(cut, label)) for label in ("student", "plain"))


def test_an_update_of_a_student_that_is_not_finite_is_skipped(distill: Distill, unstable: None) -> None:
    folder = distill(plain_control=False)
    assert [row["optim/skipped"] for row in metrics(folder)] == [0, 0, 0, 0, 1, 2]
    assert all(tensor.isfinite().all() for tensor in weights(folder).values())
    assert "history" not in json.loads((folder / "env.json").read_text())


def test_a_student_without_one_good_update_is_no_student(
    distill: Distill, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Guard, "accepts", lambda *args: False)
    with pytest.raises(Stopped, match="student: no update was applied"):
        distill(steps=1)
    assert not (tmp_path / "tiny/distill/student/model").exists()


def test_a_lower_rate_at_a_resume_holds(
    distill: Distill, stop_after: Callable[[int], Callable[[RunDir], None]]
) -> None:
    """Trainer would go on with the rate that its checkpoint was saved with."""
    with pytest.raises(KeyboardInterrupt):
        distill(hook=stop_after(3))
    slow = StudentOptimSettings(lr=1e-3, schedule="cosine", warmup_steps=2)
    rates = [row["optim/lr"] for row in metrics(distill(resume=True, optim=slow))]
    assert rates[4:6] == pytest.approx(rates[10:12]) and rates[3] > 8e-3


def test_a_damaged_checkpoint_is_refused(
    distill: Distill, stop_after: Callable[[int], Callable[[RunDir], None]], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        distill(hook=stop_after(2))
    file = tmp_path / "tiny" / "distill" / "student" / "checkpoint-3" / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match="corrupted"):
        distill(resume=True)


def test_a_disk_that_fills_is_named_and_the_run_goes_on(
    distill: Distill, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch.save raises on a full tmpfs."""

    def save(*_: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 39168 vs 39056")

    with monkeypatch.context() as full:
        full.setattr(SFTTrainer, "_save_checkpoint", save)
        with pytest.raises(RuntimeError):
            distill(name="room", steps=2)
        full.setattr("pipeline.run.files.shutil.disk_usage", lambda _: SimpleNamespace(free=0))
        with pytest.raises(UserError, match="the disk is full"):
            distill(steps=2)
    assert metrics(distill(steps=2, resume=True))[-1]["step"] == 4


def test_too_long_rows_are_counted(distill: Distill, capsys: pytest.CaptureFixture[str]) -> None:
    distill(max_completion=30, steps=1, plain_control=False)
    assert "too long ones" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"none of 200 rows of .* fits"):
        distill(name="none", max_length=5, steps=1)


def test_the_models_context_and_vocabulary_bound_the_rows(
    distill: Distill, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rotary positions go on past the context and learned ones do not; no embedding has more rows."""
    tokenizer = load_tokenizer(toy / "start")
    rows = (json.loads(line) for line in (toy / "corpus.jsonl").open())
    pairs = (encode_example(tokenizer, row["question"], "r1", row["completion"]) for row in rows)
    sizes = [len(prompt) + len(completion) for prompt, completion in pairs]
    for context in (40, 5):
        shape = {"n_positions": context, "n_embd": 32, "n_layer": 1, "n_head": 2}
        start = tmp_path / str(context)
        GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **shape)).save_pretrained(start)
        tokenizer.save_pretrained(start)
    distill(init_from=str(tmp_path / "40"), steps=1, plain_control=False)
    fit = sum(size <= 40 for size in sizes)
    assert 0 < fit < 200 and f"student: {fit} rows" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"none of 200 rows of .* fits the model's context of 5 tokens"):
        distill(name="short", init_from=str(tmp_path / "5"))
    small = len(tokenizer) - 40
    few = LlamaConfig(vocab_size=small, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(few).save_pretrained(tmp_path / "40")
    with pytest.raises(UserError, match=f"beyond the model's vocabulary of {small}; take") as error:
        distill(name="small", init_from=str(tmp_path / "40"))
    assert str(error.value).count("beyond") == 1


def test_the_clock_of_each_student_starts_with_its_own_updates(
    distill: Distill, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither preparation nor the other student's saving is time of a step."""
    real, late = StudentTrainer.__init__, [0.0]
    monkeypatch.setattr("pipeline.run.metrics.time.monotonic", lambda: time.perf_counter() + late[0])

    def slow(self: StudentTrainer, *args: Any, **more: Any) -> None:
        real(self, *args, **more)
        late[0] += 5_000.0

    monkeypatch.setattr(StudentTrainer, "__init__", slow)
    distill(steps=2)
    said = [line for line in capsys.readouterr().out.splitlines() if "s/step" in line]
    assert len(said) == 4 and all(float(line.split(" s/step")[0].split()[-1]) < 1_000 for line in said)


def test_bfloat16_trains_float32_weights(distill: Distill) -> None:
    folder = distill(dtype="bfloat16", steps=2, plain_control=False)
    assert {tensor.dtype for tensor in weights(folder).values()} == {torch.float32}
    assert metrics(folder)[1]["loss/lm"] < metrics(folder)[0]["loss/lm"]


def test_recompute_changes_the_memory_and_not_the_student(distill: Distill) -> None:
    one, two = (distill(name=str(on), recompute=on, steps=2, plain_control=False) for on in (False, True))
    assert [row["loss/lm"] for row in metrics(one)] == pytest.approx([row["loss/lm"] for row in metrics(two)])
    assert all(torch.allclose(tensor, weights(two)[name]) for name, tensor in weights(one).items())


def test_trainer_computes_where_the_stage_does_and_on_one_gpu(
    distill: Distill, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[dict[str, Any]] = []

    def config(**given: Any) -> SimpleNamespace:
        seen.append(given)
        return SimpleNamespace(n_gpu=8)

    monkeypatch.setattr("distill.trainer.SFTConfig", config)
    rows = Dataset.from_dict({})
    job = Job("student", "r1", rows, [], [[0]], [], 1, StudentOptimSettings())
    for device in ("cpu", "cuda"):
        made: Any = arguments(job, DistillSettings(recompute=True), tmp_path, torch.device(device))
        assert made._n_gpu == 1, "Trainer would split a micro-batch over every GPU"
    assert [(given["use_cpu"], given["dataloader_pin_memory"]) for given in seen] == [
        (True, False),
        (False, True),
    ]
    assert all(given["gradient_checkpointing"] for given in seen)


def test_a_checkpoint_can_be_the_start(distill: Distill) -> None:
    first = distill(steps=20, plain_control=False)
    start = str(first / "student" / "model")
    second = distill(name="second", steps=1, plain_control=False, init_from=start)
    assert metrics(second)[0]["loss/lm"] < metrics(first)[0]["loss/lm"] - 2


def test_a_start_that_cannot_be_read_is_one_line(distill: Distill, tmp_path: Path) -> None:
    T5Config(num_layers=1).save_pretrained(tmp_path / "t5")
    with pytest.raises(UserError, match=r"cannot load the model at .*/t5: .*has no tokenizer\.json"):
        distill(name="odd", init_from=str(tmp_path / "t5"))
    with pytest.raises(UserError, match=r"cannot load the model at .*T5Config") as error:
        first_weights(DistillSettings(), tmp_path / "t5")
    assert "\n" not in str(error.value)
    LlamaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(
        tmp_path / "cut"
    )
    (tmp_path / "cut/model.safetensors").write_bytes(bytes(9))
    with pytest.raises(UserError, match=r"cannot load the model at .*/cut: .*header"):
        first_weights(DistillSettings(), tmp_path / "cut")


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="micro-batch holds"):
        DistillSettings(max_length=512, tokens_per_step=512, micro_batches=2)
    with pytest.raises(ValueError, match="cosine or constant"):
        DistillSettings(optim=StudentOptimSettings(schedule="linear"))
    with pytest.raises(ValueError, match="unknown template"):
        DistillSettings(template="nope")


def test_lora_without_peft_says_what_to_install() -> None:
    try:
        import peft  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="pip install peft"):
            lora_config(8)
    else:
        assert lora_config(8).r == 8
    assert lora_config(0) is None
