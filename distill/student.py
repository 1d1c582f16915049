"""Distillation: a small dense student learns the corpus by supervised training alone, no RL.

With `plain_control` a twin with the same first weights learns the same questions answered without
reasoning, for the same number of updates and of tokens (prompt and completion). What separates the two in the
evaluation is then what the traces teach.

    runs/NAME/distill/student/model    the student
    runs/NAME/distill/plain/model      the control

Paper   arXiv:2501.12948  Sec. 2.4 (distillation: SFT only), supplementary (2 to 3 epochs, learning rate
        1e-4 for 1.5B, cosine to a tenth, context 32,768, batch 64)
"""

from __future__ import annotations

import json
import math
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from distill.batches import Example, plan
from distill.corpus import WORKED, apart_from, plain_rows, read_solutions, worked_rows
from pipeline.arguments import OptimConfig, StageConfig
from pipeline.data.corpus import Row, read_corpus
from pipeline.data.problems import data_folder
from pipeline.errors import UserError
from pipeline.run.metrics import say
from rollout.text.templates import template_named
from rollout.text.tokenizer import encode_example, load_tokenizer

if TYPE_CHECKING:
    from distill.trainer import Job
    from pipeline.run.directory import RunDir


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A fresh dense student: a Llama (arXiv:2302.13971), so that every engine can run it."""

    hidden: int = 128
    """Width of the residual stream."""
    layers: int = 4
    """Transformer blocks."""
    heads: int = 4
    """Attention heads; divides `hidden`."""
    intermediate: int = 384
    """Width of the gated feed-forward."""
    initializer_range: float = 0.05
    """Standard deviation of initial weights; at this width 0.05 learns to copy sooner than 0.02."""

    def __post_init__(self) -> None:
        if self.hidden % (2 * self.heads):
            raise ValueError(f"shape.hidden={self.hidden} is no even multiple of shape.heads={self.heads}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """Pretraining of a fresh student, so that it can read before it is taught, as R1's students could."""

    steps: int = 0
    """Updates on generated documents (`pipeline.data.traces`); 0 = fresh weights are taught at once."""
    tokens_per_step: int = 1024
    """Tokens of an update."""
    task: str = "all"
    """Mixture or family of `pipeline.data.generators` that the documents are about; train split only."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=1e-3, warmup_steps=30, schedule="cosine")
    )
    """AdamW and its schedule."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(StageConfig):
    """Distillation into small dense students. Defaults: the tiny chain, minutes on two cores."""

    corpus: tuple[str, ...] = ("reject",)
    """Traces to learn: a stage of this run that wrote corpus.jsonl (reject), a file of that format, or the
    worked solutions of gsm8k_train, math_train."""
    count: int = 0
    """Traces used, drawn at random by `seed`, before too long ones are dropped; 0 = all."""
    data: Path | None = None
    """Folder with gsm8k_train.jsonl and math_train.jsonl; default: the environment variable R1_DATA."""
    heldout: tuple[str, ...] = ("gsm8k", "math500")
    """Benchmarks whose copies and near copies are dropped from worked solutions."""
    init_from: str = ""
    """Dense checkpoint to start from: a stage of this run (smollm2), a directory; empty = a fresh `shape`."""
    tokenizer_from: str = "pretrain"
    """Stage of this run, or directory, whose tokenizer a fresh student takes."""
    shape: Shape = field(default_factory=Shape)
    """The fresh student; unused with init_from."""
    base: Base = field(default_factory=Base)
    """Its pretraining; student and control start from the same result. Unused with init_from."""
    lora_rank: int = 0
    """Rank of LoRA adapters (arXiv:2106.09685) on all linear layers, merged at the end; 0 = full training."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the forward and backward; bfloat16 keeps float32 weights and moments."""
    template: str = "r1"
    """Prompt template of the student, in training and, by its pipeline.json, in evaluation."""
    plain_control: bool = True
    """Also train the control on the same questions answered without reasoning."""
    plain_template: str = "plain"
    """Prompt template of the control."""
    max_length: int = 512
    """Longest row, tokens of prompt and completion; longer ones are dropped and counted (R1: 32,768)."""
    max_completion: int = 0
    """Longest completion, tokens; longer ones are dropped and counted. 0 = only max_length bounds it."""
    epochs: float = 2.0
    """Passes over the traces (R1: 2 to 3). The control gets as many tokens, so more passes."""
    steps: int = 0
    """Updates of each student; 0 = as many as `epochs` takes."""
    tokens_per_step: int = 2048
    """Tokens of an update, prompt and completion, padding not counted."""
    micro_batches: int = 1
    """Parts that an update is split into, to fit memory; the gradient is that of the whole."""
    save_every: int = 0
    """Updates between checkpoints; 0 = at the end of each student and after a Ctrl-C."""
    log_every: int = 10
    """Updates between lines of the log; the loss is their mean."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=3e-3, schedule="cosine", warmup_steps=10, weight_decay=0.01)
    )
    """AdamW. A fresh student of a million parameters takes 3e-3, a pretrained one much less (R1: 1e-4)."""

    def __post_init__(self) -> None:
        room = self.tokens_per_step // max(1, self.micro_batches)
        template_named(self.template)
        template_named(self.plain_template)
        if self.optim.schedule == "linear":
            raise ValueError("optim.schedule must be cosine or constant here; R1 distills with cosine.")
        if self.max_length > room:
            raise ValueError(
                f"max_length={self.max_length} is more than a micro-batch holds (tokens_per_step / "
                f"micro_batches = {room}); lower the one or raise the other."
            )
        if (
            self.epochs <= 0
            or min(self.steps, self.count, self.save_every, self.lora_rank, self.max_completion) < 0
        ):
            raise ValueError(
                "epochs must be above 0; steps, count, save_every, lora_rank, max_completion at least 0."
            )
        if min(self.micro_batches, self.max_length, self.log_every) < 1:
            raise ValueError("micro_batches, max_length and log_every must be at least 1.")


@dataclass(frozen=True, slots=True)
class Course:
    """What one model is taught."""

    label: str
    template: str
    examples: list[Example]


@dataclass(frozen=True, slots=True)
class Lesson:
    """A course, and how long and in what portions it is taught."""

    course: Course
    steps: int
    tokens_per_step: int
    micro_batches: int
    optim: OptimConfig

    def job(self, first: int, total: int, config: Config) -> Job:
        """The updates, planned; they are steps `first + 1` .. of the stage's `total`."""
        from distill.trainer import Job

        lengths = [len(example) for example in self.course.examples]
        budget = self.tokens_per_step // self.micro_batches
        return Job(
            label=self.course.label,
            examples=self.course.examples,
            batches=plan(lengths, self.steps * self.micro_batches, budget, config.seed),
            accumulate=self.micro_batches,
            first=first,
            total=total,
            save_every=config.save_every,
            log_every=config.log_every,
        )


# ---- the corpus


def solutions(config: Config, source: str) -> list[Row]:
    """GSM8K's or MATH's training solutions as traces in the form that the template asks for."""
    folder = data_folder(config.data)
    solved = read_solutions(source, folder)
    apart = apart_from(solved, config.heldout, folder)
    if len(apart) < len(solved):
        copies = len(solved) - len(apart)
        say(f"distill: {source}: left out {copies} near copies of {', '.join(config.heldout)}")
    return list(worked_rows(apart, tags=template_named(config.template).think == "open"))


def traces(config: Config, run_dir: RunDir) -> list[Row]:
    """The rows of every source of the corpus, one after the other."""
    rows: list[Row] = []
    for source in config.corpus:
        if source in WORKED:
            found = solutions(config, source)
        else:
            found = read_corpus(run_dir.file_input(source, "corpus.jsonl"))
        say(f"distill: {len(found)} traces from {source}")
        rows += found
    if 0 < config.count < len(rows):
        rows = random.Random(f"distill/{config.seed}").sample(rows, config.count)
    return rows


def course(label: str, template: str, rows: list[Row], tokenizer: Any, config: Config) -> Course:
    """Rows as token ids; too long ones are dropped, and the console says how many."""
    longest = config.max_completion or config.max_length
    kept = []
    for row in rows:
        try:
            example = Example(*encode_example(tokenizer, row.question, template, row.completion))
        except ValueError as error:
            raise UserError(f"trace {row.id} does not fit template {template}: {error}") from error
        if len(example) <= config.max_length and len(example.completion_ids) <= longest:
            kept.append(example)
    if not kept:
        raise UserError(f"distill: none of {len(rows)} rows fits max_length={config.max_length}; raise it")
    tokens = sum(map(len, kept))
    say(
        f"distill: {label}: {len(kept)} rows, {tokens / len(kept):.0f} tokens each"
        + (f"; dropped {len(rows) - len(kept)} too long ones" if len(kept) < len(rows) else "")
    )
    return Course(label, template, kept)


def documents(config: Config, tokenizer: Any) -> Course:
    """Pretraining documents for every update of the base, each token scored."""
    from pipeline.data.traces import corpus

    wanted = config.base.steps * config.base.tokens_per_step
    examples: list[Example] = []
    tokens = 0
    for text in corpus(config.base.task, 20_000, config.seed):
        ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        examples.append(Example(ids[:1], ids[1:]))
        tokens += len(ids)
        if tokens >= wanted:
            break
    return Course("base", "r1-zero-short", examples)


# ---- the model


def first_weights(config: Config, tokenizer: Any, init: Path | None) -> Any:
    """The student before training; the same bits each time it is called."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(config.seed)
    if init is not None:
        return AutoModelForCausalLM.from_pretrained(init, dtype=torch.float32)
    shape = config.shape
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            intermediate_size=shape.intermediate,
            initializer_range=shape.initializer_range,
            max_position_embeddings=max(2048, config.max_length),
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def lora_config(rank: int) -> Any:
    """Adapters for every linear layer but the head, or None for rank 0."""
    if not rank:
        return None
    try:
        from peft import LoraConfig
    except ImportError:
        raise UserError(f"lora_rank={rank} needs peft: pip install peft, or set lora_rank = 0") from None
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def save(model: Any, tokenizer: Any, folder: Path, template: str, card: str) -> None:
    """A public checkpoint with tokenizer, template and card; it appears whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "pipeline.json").write_text(json.dumps({"template": template}) + "\n", encoding="utf-8")
    (partial / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def model_card(config: Config, course: Course, parameters: int, tokens: int, steps: int) -> str:
    """What it is, from what, and how it was trained."""
    start = f"the checkpoint {config.init_from}" if config.init_from else "fresh weights"
    taught = {
        "base": "generated documents (pretraining)",
        "student": "worked traces",
        "plain": "answers without reasoning (the control)",
    }[course.label]
    return (
        f"# {config.name}: distilled {course.label}\n\n"
        f"{parameters:,} parameters, dense, from {start}; supervised training on {taught}.\n\n"
        f"- corpus: {', '.join(config.corpus)}; {len(course.examples):,} rows\n"
        f"- {steps:,} updates, {tokens:,} tokens of prompt and completion, seed {config.seed}\n"
        f"- AdamW, learning rate {config.optim.lr:g}, {config.optim.schedule}; arithmetic {config.dtype}\n"
        f"- prompt template: {course.template}\n\n"
        "Trained by r1-pipeline with TRL's SFTTrainer after arXiv:2501.12948, Sec. 2.4. A research artefact, "
        "not a product.\n"
    )


# ---- the stage


def run(config: Config, run_dir: RunDir) -> None:
    """Train the student, then, if asked for, its control."""
    from distill.trainer import quiet, train
    from pipeline.train.policy import set_up

    set_up(config.seed, config.threads)
    quiet()
    lora = lora_config(config.lora_rank)
    init = run_dir.model_input(config.init_from) if config.init_from else None
    tokenizer = load_tokenizer(init or run_dir.model_input(config.tokenizer_from))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = traces(config, run_dir)
    courses = [course("student", config.template, rows, tokenizer, config)]
    if config.plain_control:
        courses.append(course("plain", config.plain_template, plain_rows(rows), tokenizer, config))
    tokens = sum(map(len, courses[0].examples))
    steps = config.steps or max(1, math.ceil(config.epochs * tokens / config.tokens_per_step))
    lessons = [Lesson(c, steps, config.tokens_per_step, config.micro_batches, config.optim) for c in courses]
    if config.base.steps and init is None:
        base = config.base
        lessons.insert(
            0, Lesson(documents(config, tokenizer), base.steps, base.tokens_per_step, 1, base.optim)
        )

    total = sum(lesson.steps for lesson in lessons)
    first = 0
    for lesson in lessons:
        taught, folder = lesson.course, run_dir.path / lesson.course.label / "model"
        if folder.is_dir():
            say(f"distill: {taught.label} is already trained")
        else:
            job = lesson.job(first, total, config)
            model = first_weights(config, tokenizer, init)
            parameters, seen = model.num_parameters(), job.tokens(lesson.steps)
            size = f"{parameters / 1e6:.2f}M parameters"
            say(f"distill: {taught.label}: {size}, {lesson.steps} updates, {seen:,} tokens")
            bf16 = config.dtype == "bfloat16"
            model = train(
                model, tokenizer, job, run_dir, lesson.optim, seed=config.seed, bf16=bf16, lora=lora
            )
            card = model_card(config, taught, parameters, seen, lesson.steps)
            save(model, tokenizer, folder, taught.template, card)
            run_dir.stop_if_interrupted()
        if taught.label == "base":
            init = folder
        first += lesson.steps
