"""Distillation: a small dense student learns the corpus by supervised training alone, no RL.

With `plain_control` a twin with the same first weights learns the same questions answered without
reasoning, for the same number of updates and of tokens (prompt and completion). What separates the two in the
evaluation is then what the traces teach.

    runs/NAME/distill/student/model    the student
    runs/NAME/distill/plain/model      the control

Paper   arXiv:2501.12948  Sec. 2.4 (distillation: SFT only), supplementary (2 to 3 epochs, learning rate
        1e-4 for 1.5B, cosine to a tenth, context 32,768, batch 64)
"""

import copy
import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from tokenizers import AddedToken
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.utils import logging

from distill.batches import once, plan
from distill.corpus import IDS, plain_rows, stored, texts, tokenized
from distill.trainer import Job, Watch, train
from model.dense import read_network
from pipeline.data.corpus import Row
from pipeline.errors import UserError
from pipeline.run.directory import RunDir
from pipeline.run.guard import Guard
from pipeline.run.metrics import say
from pipeline.run.rollback import guarded, slowed
from pipeline.run.usage import Usage
from pipeline.settings.distill import DistillSettings, StudentOptimSettings
from pipeline.train.place import Place
from pipeline.train.policy import describe, loading
from rollout.text.templates import template_named
from rollout.text.tokenizer import ASSISTANT, CHAT_TEMPLATE, TAGS, USER, chat_text, load_tokenizer, render

# ---- the jobs


def planned(
    config: DistillSettings, optim: StudentOptimSettings, tokenizer: Any, run_dir: RunDir, init: Path
) -> list[Job]:
    """What is trained, in this order: the student; its control, if asked for. The first `eval_rows` rows by
    the hash of their question, and all others of the same questions, are held out of both."""
    learned = [("student", config.template)] + [("plain", config.plain_template)] * config.plain_control
    corpus, last, steps, jobs = texts(config, run_dir), -1, config.steps, list[Job]()
    room = config.tokens_per_step // config.micro_batches
    for label, template in learned:
        some: Iterable[Row] = (Row(**row) for row in corpus)
        some = plain_rows(some) if label == "plain" else some
        rows = stored(run_dir, label, tokenized(label, template, some, tokenizer, config, init), IDS)
        lengths = pc.list_value_length(rows.data["input_ids"]).to_pylist()
        keys = rows.data["question"].to_numpy()
        if config.eval_rows and not jobs:
            last = int(np.sort(keys)[min(config.eval_rows, len(rows)) - 1])
        taught, held = np.flatnonzero(keys > last).tolist(), np.flatnonzero(keys <= last).tolist()
        if not taught or (config.eval_rows and not held):
            raise UserError(f"eval_rows={config.eval_rows} of {len(rows)} rows leave none to learn; lower it")
        sizes = [lengths[row] for row in taught]
        steps = steps or max(1, math.ceil(config.epochs * sum(sizes) / config.tokens_per_step))
        batches = plan(sizes, steps * config.micro_batches, room, config.seed)
        batches = [[taught[i] for i in batch] for batch in batches]
        checks = [[held[i] for i in batch] for batch in once([lengths[row] for row in held], room)]
        rows = rows.select_columns(["input_ids", "labels"])
        jobs.append(Job(label, template, rows, lengths, batches, checks, config.micro_batches, optim))
    return jobs


# ---- the model


def first_weights(config: DistillSettings, init: Path) -> Any:
    """The student before training."""
    torch.manual_seed(config.seed)
    with loading(init):
        return read_network(init, dtype=torch.float32)


def rate_for(model: Any) -> float:
    """The peak learning rate by size: R1's students', and at the small end the tiny chain's."""
    size, llama = model.num_parameters(), model.config.model_type == "llama"
    family = [(8.0e9, 5e-5)] if llama else [(7.6e9, 8e-5), (14.8e9, 7e-5), (32.8e9, 6e-5)]
    sizes, rates = np.log([(1e6, 6e-4), (1.5e9, 1e-4), *family, (70.6e9, 2e-5)]).T
    rate = float(f"{np.exp(np.interp(np.log(size), sizes, rates)):.3g}")
    say(f"distill: learning rate {rate:g}, for {size / 1e6:.1f}M parameters")
    return rate


def lora_config(rank: int) -> Any:
    """Adapters for every linear layer but the head, or None for rank 0."""
    if not rank:
        return None
    try:
        from peft import LoraConfig
    except ImportError:
        raise UserError(f"lora_rank={rank} needs peft: pip install peft, or set lora_rank = 0") from None
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def model_card(config: DistillSettings, job: Job, best: int | None, parameters: int) -> str:
    """What it is, from what, and how it was trained."""
    taught = "worked traces" if job.label == "student" else "answers without reasoning (the control)"
    held = f", {sum(map(len, job.checks)):,} of them held out" if job.checks else ""
    of = f"; the weights are those of update {best}, of the lowest held-out loss" if best else ""
    return (
        f"# {config.name}: distilled {job.label}\n\n"
        f"{parameters:,} parameters, dense, from the checkpoint {config.init_from}; supervised training on "
        f"{taught}.\n\n"
        f"- corpus: {', '.join(config.corpus)}; {len(job.rows):,} rows{held}\n"
        f"- {job.steps:,} updates, {job.tokens:,} tokens of prompt and completion, seed {config.seed}{of}\n"
        f"- AdamW, learning rate {job.optim.lr:g}, {job.optim.schedule}; arithmetic {config.dtype}\n"
        f"- prompt template: {job.template}; sample at temperature 0.6, top-p 0.95\n\n"
        "Trained by r1-pipeline with TRL's SFTTrainer after arXiv:2501.12948, Sec. 2.4. A research artefact, "
        "not a product.\n"
    )


def speaking(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of the checkpoint at `path`, with a pad token and a chat template: without one of its
    own, that of R1, whose control tokens are plain words where the vocabulary lacks them."""
    with loading(path):
        tokenizer = load_tokenizer(path)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not tokenizer.chat_template:
        chat, known = CHAT_TEMPLATE, {USER, ASSISTANT} <= tokenizer.get_vocab().keys()
        for token, words in () if known else ((USER, "User: "), (ASSISTANT, "\\n\\nAssistant: ")):
            chat = chat.replace(token, words)
        tokenizer.chat_template = chat
        form = "that of R1" if known else "that of R1 in plain words"
        say(f"distill: {path} has no chat template; the student gets {form}")
    return tokenizer


def as_taught(tokenizer: PreTrainedTokenizerFast, name: str) -> str:
    """The chat template that opens the thinking where prompt template `name` did, and nowhere else: what was
    trained is then what a chat starts."""
    chat, template = str(tokenizer.chat_template), template_named(name)
    if not template.chat:
        return chat
    own = chat_text(tokenizer, [{"role": "user", "content": template.text.format(question="?")}])
    taught = render(tokenizer, "?", name)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(own, taught, strict=False)))
    shown = f"text[: text | length - {len(own) - same}] + {taught[same:]!r}"
    held = f"{{% set text %}}{chat.removesuffix(chr(10))}{{% endset %}}"
    return f"{held}{{{{ {shown} if add_generation_prompt else text }}}}" if own != taught else chat


# ---- the stage


def save_student(
    model: Any, tokenizer: Any, job: Job, best: int | None, config: DistillSettings, path: Path
) -> None:
    """Weights, tokenizer, chat template, sampling (arXiv:2501.12948, Sec. 3) and card of a job's model."""
    ends = model.generation_config.eos_token_id
    ends = dict.fromkeys([tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])])
    ids = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    ids |= {"eos_token_id": [end for end in ends if end is not None]}
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.95, **ids)
    model.save_pretrained(path)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = as_taught(tokenizer, job.template)
    tags = [tag for tag in TAGS if tag in tokenizer.get_vocab()]  # special ones, decoders would drop
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    tokenizer.extra_special_tokens = [t for t in tokenizer.extra_special_tokens if str(t) not in TAGS]
    card = model_card(config, job, best, model.num_parameters())
    describe(path, tokenizer, job.template, card, tokens={"trained": job.tokens})


def run(config: DistillSettings, run_dir: RunDir) -> None:
    """Train the student, then, if asked for, its control."""
    place = Place.open(config)
    logging.set_verbosity_error()  # no notes of Trainer's on the token ids that it aligns
    lora = lora_config(config.lora_rank)
    init = run_dir.model_input(config.init_from)
    tokenizer = speaking(init)
    optim = config.optim
    if not optim.lr:
        optim = replace(optim, lr=rate_for(first_weights(config, init)))
    jobs = planned(config, optim, tokenizer, run_dir, init)
    first, total = 0, sum(job.steps for job in jobs)
    for job in jobs:
        if (run_dir.path / job.label / "model").is_dir():
            say(f"distill: {job.label} is already trained")
        else:

            def taught(job: Job = job, first: int = first) -> tuple[Any, int, int | None]:
                job = replace(job, optim=slowed(job.optim, run_dir, first))
                guard = Guard(config.guard, job.optim.clip, first, run_dir.era)
                model = first_weights(config, init)
                size = f"{model.num_parameters() / 1e6:.2f}M parameters"
                say(f"distill: {job.label}: {size}, {job.steps} updates, {job.tokens:,} tokens")
                watch = Watch(job, run_dir, first, total, Usage(model.config, place.device), guard)
                trained = train(model, tokenizer, job, run_dir, config, watch, lora, place.device)
                guard.check_trained(f"distill: {job.label}")
                return trained

            model, ended, best = guarded(run_dir, config.guard, taught)
            made = replace(job, batches=job.batches[: ended * job.accumulate])
            save = partial(save_student, model, tokenizer, made, best, config)
            run_dir.save_model(save, f"{job.label}/model")
            run_dir.stop_if_interrupted()
        first += job.steps
