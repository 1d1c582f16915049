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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from distill.batches import Example, plan
from distill.corpus import WORKED, apart_from, plain_rows, read_solutions, worked_rows
from distill.trainer import Job, quiet, train
from pipeline.data.corpus import Row, read_corpus
from pipeline.data.problems import data_folder
from pipeline.data.traces import corpus
from pipeline.errors import UserError
from pipeline.run.directory import RunDir
from pipeline.run.files import replacing
from pipeline.run.metrics import say
from pipeline.settings.common import AdamWSettings
from pipeline.settings.distill import DistillSettings
from pipeline.train.policy import set_up
from rollout.text.templates import template_named
from rollout.text.tokenizer import encode_example, load_tokenizer


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
    optim: AdamWSettings

    def job(self, first: int, total: int, config: DistillSettings) -> Job:
        """The updates, planned; they are steps `first + 1` .. of the stage's `total`."""
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


def solutions(config: DistillSettings, source: str) -> list[Row]:
    """GSM8K's or MATH's training solutions as traces in the form that the template asks for."""
    folder = data_folder(config.data)
    solved = read_solutions(source, folder)
    apart = apart_from(solved, config.heldout, folder)
    if len(apart) < len(solved):
        copies = len(solved) - len(apart)
        say(f"distill: {source}: left out {copies} near copies of {', '.join(config.heldout)}")
    return list(worked_rows(apart, tags=template_named(config.template).think == "open"))


def traces(config: DistillSettings, run_dir: RunDir) -> list[Row]:
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


def course(label: str, template: str, rows: list[Row], tokenizer: Any, config: DistillSettings) -> Course:
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


def documents(config: DistillSettings, tokenizer: Any) -> Course:
    """Pretraining documents for every update of the base, each token scored."""
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


def first_weights(config: DistillSettings, tokenizer: Any, init: Path | None) -> Any:
    """The student before training; the same bits each time it is called."""
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
    """A public checkpoint with tokenizer, template and card; it appears complete or not at all."""
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    with replacing(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / "pipeline.json").write_text(json.dumps({"template": template}) + "\n", encoding="utf-8")
        (partial / "README.md").write_text(card, encoding="utf-8")


def model_card(config: DistillSettings, course: Course, parameters: int, tokens: int, steps: int) -> str:
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


def run(config: DistillSettings, run_dir: RunDir) -> None:
    """Train the student, then, if asked for, its control."""
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
