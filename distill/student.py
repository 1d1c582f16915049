"""Distillation: a small dense student learns the corpus by supervised training alone, no RL.

With `plain_control` a twin with the same first weights learns the same questions answered without
reasoning, for the same number of updates and of tokens (prompt and completion). What separates the two in the
evaluation is then what the traces teach.

    runs/NAME/distill/student/model    the student
    runs/NAME/distill/plain/model      the control

Paper   arXiv:2501.12948  Sec. 2.4 (distillation: SFT only), supplementary (2 to 3 epochs, learning rate
        1e-4 for 1.5B, cosine to a tenth, context 32,768, batch 64)
"""

import math
import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from distill.batches import Example, plan
from distill.corpus import WORKED, apart_from, plain_rows, worked_rows
from distill.trainer import Job, Watch, train
from model.dense import read_network
from pipeline.data.corpus import Row, read_corpus
from pipeline.data.pool import encoded
from pipeline.data.problems import data_folder
from pipeline.data.solutions import read_solutions
from pipeline.data.traces import corpus
from pipeline.errors import UserError
from pipeline.run.directory import RunDir
from pipeline.run.guard import Guard
from pipeline.run.metrics import say
from pipeline.run.rollback import guarded, slowed
from pipeline.run.usage import Usage
from pipeline.settings.distill import DistillSettings
from pipeline.train.place import Place
from pipeline.train.policy import describe, loading
from rollout.text.templates import template_named
from rollout.text.tokenizer import load_tokenizer

# ---- the corpus


def solutions(config: DistillSettings, source: str) -> list[Row]:
    """GSM8K's or MATH's training solutions as traces in the form that the template asks for."""
    folder = data_folder(config.data)
    solved = read_solutions(source, folder, config)
    apart = apart_from(solved, config.heldout, folder)
    if copies := len(solved) - len(apart):
        say(f"distill: {source}: left out {copies} near copies of {', '.join(config.heldout)}")
    return list(worked_rows(apart, tags=template_named(config.template).think == "open"))


def traces(config: DistillSettings, run_dir: RunDir) -> list[Row]:
    """The rows of every source of the corpus, one after the other."""
    rows: list[Row] = []
    for source in config.corpus:
        worked = source in WORKED
        found = (
            solutions(config, source) if worked else read_corpus(run_dir.corpus_input(source), rows=config)
        )
        say(f"distill: {len(found)} traces from {source}")
        rows += found
    if 0 < config.count < len(rows):
        rows = random.Random(f"distill/{config.seed}").sample(rows, config.count)
    run_dir.record_rows(f"the corpus of {', '.join(config.corpus)}", rows)
    return rows


def examples(
    label: str, template: str, rows: list[Row], tokenizer: Any, config: DistillSettings
) -> list[Example]:
    """Rows as token ids; too long ones are dropped and counted on the console."""
    longest = config.max_completion or config.max_length
    every = [Example(*pair) for pair in encoded(rows, tokenizer, template, config)]
    kept = [e for e in every if len(e) <= config.max_length and len(e.completion_ids) <= longest]
    if not kept:
        where = ", ".join(config.corpus)
        raise UserError(f"none of {len(rows)} rows of {where} fits max_length={config.max_length}; raise it")
    dropped = f"; dropped {len(every) - len(kept)} too long ones" if len(kept) < len(every) else ""
    say(f"distill: {label}: {len(kept)} rows, {sum(map(len, kept)) / len(kept):.0f} tokens each{dropped}")
    return kept


def documents(config: DistillSettings, tokenizer: Any) -> list[Example]:
    """Pretraining documents for every update of the base, each token scored."""
    examples: list[Example] = []
    left = config.base.steps * config.base.tokens_per_step
    texts = corpus(config.base.task, 20_000, config.seed)
    while left > 0:
        ids = [*tokenizer.encode(next(texts), add_special_tokens=False), tokenizer.eos_token_id]
        examples.append(Example(ids[:1], ids[1:]))
        left -= len(ids)
    return examples


def planned(config: DistillSettings, tokenizer: Any, run_dir: RunDir, base: bool) -> list[Job]:
    """What is trained, in this order: the base, if asked for; the student; its control, if asked for."""

    def job(label: str, template: str, of: list[Example], steps: int, size: int, parts: int) -> Job:
        batches = plan([len(example) for example in of], steps * parts, size // parts, config.seed)
        return Job(label, template, of, batches, parts, (config.base if label == "base" else config).optim)

    rows = traces(config, run_dir)
    learned = [("student", config.template, rows)]
    if config.plain_control:
        learned.append(("plain", config.plain_template, plain_rows(rows)))
    courses = [(label, t, examples(label, t, some, tokenizer, config)) for label, t, some in learned]
    tokens, size = sum(map(len, courses[0][2])), config.tokens_per_step
    steps = config.steps or max(1, math.ceil(config.epochs * tokens / size))
    jobs = [job(*course, steps, size, config.micro_batches) for course in courses]
    if base:
        texts = documents(config, tokenizer)
        first = job("base", "r1-zero-short", texts, config.base.steps, config.base.tokens_per_step, 1)
        jobs.insert(0, first)
    return jobs


# ---- the model


def first_weights(config: DistillSettings, tokenizer: Any, init: Path | None) -> Any:
    """The student before training; the same bits each time it is called."""
    torch.manual_seed(config.seed)
    if init is not None:
        with loading(init):
            return read_network(init, dtype=torch.float32)
    shape = config.shape
    llama = LlamaConfig(
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
    return LlamaForCausalLM(llama)


def lora_config(rank: int) -> Any:
    """Adapters for every linear layer but the head, or None for rank 0."""
    if not rank:
        return None
    try:
        from peft import LoraConfig
    except ImportError:
        raise UserError(f"lora_rank={rank} needs peft: pip install peft, or set lora_rank = 0") from None
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def model_card(config: DistillSettings, job: Job, parameters: int) -> str:
    """What it is, from what, and how it was trained."""
    start = f"the checkpoint {config.init_from}" if config.init_from else "fresh weights"
    taught = {
        "base": "generated documents (pretraining)",
        "student": "worked traces",
        "plain": "answers without reasoning (the control)",
    }[job.label]
    return (
        f"# {config.name}: distilled {job.label}\n\n"
        f"{parameters:,} parameters, dense, from {start}; supervised training on {taught}.\n\n"
        f"- corpus: {', '.join(config.corpus)}; {len(job.examples):,} rows\n"
        f"- {job.steps:,} updates, {job.tokens:,} tokens of prompt and completion, seed {config.seed}\n"
        f"- AdamW, learning rate {job.optim.lr:g}, {job.optim.schedule}; arithmetic {config.dtype}\n"
        f"- prompt template: {job.template}\n\n"
        "Trained by r1-pipeline with TRL's SFTTrainer after arXiv:2501.12948, Sec. 2.4. A research artefact, "
        "not a product.\n"
    )


# ---- the stage


def save_student(model: Any, tokenizer: Any, job: Job, config: DistillSettings, path: Path) -> None:
    """Weights, tokenizer, template and card of a job's model."""
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(path)
    describe(path, tokenizer, job.template, model_card(config, job, model.num_parameters()))


def run(config: DistillSettings, run_dir: RunDir) -> None:
    """Train the student, then, if asked for, its control."""
    place = Place.open(config)
    logging.set_verbosity_error()  # no notes of Trainer's on the token ids that it aligns
    lora = lora_config(config.lora_rank)
    init = run_dir.model_input(config.init_from) if config.init_from else None
    speaker = init or run_dir.model_input(config.tokenizer_from)
    with loading(speaker):
        tokenizer = load_tokenizer(speaker)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    jobs = planned(config, tokenizer, run_dir, base=bool(config.base.steps and init is None))
    first, total = 0, sum(job.steps for job in jobs)
    for job in jobs:
        folder = run_dir.path / job.label / "model"
        if folder.is_dir():
            say(f"distill: {job.label} is already trained")
        else:

            def taught(job: Job = job, first: int = first, init: Path | None = init) -> Any:
                job = replace(job, optim=slowed(job.optim, run_dir, first))
                guard = Guard(config.guard, job.optim.clip, first, run_dir.era)
                model = first_weights(config, tokenizer, init)
                size = f"{model.num_parameters() / 1e6:.2f}M parameters"
                say(f"distill: {job.label}: {size}, {job.steps} updates, {job.tokens:,} tokens")
                watch = Watch(job, run_dir, first, total, Usage(model.config, place.device), guard)
                model = train(model, tokenizer, job, run_dir, config, watch, lora, place.device)
                guard.check_trained(f"distill: {job.label}")
                return model

            model = guarded(run_dir, config.guard, taught)
            save = partial(save_student, model, tokenizer, job, config)
            run_dir.save_model(save, f"{job.label}/model")
            run_dir.stop_if_interrupted()
        if job.label == "base":
            init = folder
        first += job.steps
