"""Stages `sft` and `sft2`: supervised fine-tuning of the native model on complete completions.

The cold start (arXiv:2501.12948, Sec. 2.3.1) takes curated worked traces and R1-Zero's own samples, kept if
right and readable and put into one canonical form. The second SFT (Sec. 2.3.3) starts from the base again, on
the corpus that rejection sampling kept.
"""

import random
from collections.abc import Iterator

import numpy as np
from transformers import PreTrainedTokenizerFast

from model.policy import Policy
from pipeline.data.corpus import Row, read_corpus, readable, split_blocks, tagged, write_corpus
from pipeline.data.jsonl import read_log
from pipeline.data.pool import apart, encoded
from pipeline.data.traces import curated_rows
from pipeline.errors import UserError
from pipeline.run.directory import RunDir
from pipeline.run.guard import Guard
from pipeline.run.rollback import guarded, slowed
from pipeline.settings.supervised import SftSettings
from pipeline.train.learner import Learner
from pipeline.train.memory import check_memory
from pipeline.train.pack import Batch, Encoded, pack_supervised
from pipeline.train.place import Place
from pipeline.train.policy import load_policy, save_policy
from pipeline.train.supervised import train_loop


def gather(config: SftSettings, run_dir: RunDir) -> list[Row]:
    """The corpus: curated traces, RL samples, rows of a file, in this order."""
    rows: list[Row] = []
    if config.curated:
        rows += curated_rows(config.curated_task, config.curated, config.seed + 1)
    if config.samples_from:
        path = run_dir.file_input(config.samples_from, "samples.jsonl")
        rows += kept_samples(read_log(path), config)
    if config.corpus:
        rows += read_corpus(run_dir.corpus_input(config.corpus), config.count, config.seed, config)
    rows = list(apart(rows, config, run_dir))
    if not rows:
        stage = run_dir.stage.name
        raise UserError(f"{stage}: no rows are left after filtering; train {config.samples_from} longer")
    return rows


def kept_samples(samples: list[dict], config: SftSettings) -> list[Row]:
    """Right, in format, in one language, without repetition: R1-Zero's samples in the canonical form."""
    rows: list[Row] = []
    seen: set[str] = set()
    for s in reversed(samples):
        blocks = split_blocks(s["text"])
        good = s["verdict"] == "correct" and "turns" not in s and s["parts"].get("language", 0) >= 0.99
        if good and blocks and readable(blocks[0]) and s["question"] not in seen:
            seen.add(s["question"])
            text, source = tagged(*blocks), f"samples:{s.get('source', config.samples_from)}"
            rows.append(Row(s["id"], s["question"], text, blocks[1], s["language"], s["kind"], source))
        if config.max_samples and len(rows) == config.max_samples:
            break
    return rows


def examples(
    rows: list[Row], tokenizer: PreTrainedTokenizerFast, config: SftSettings, positions: int, vocabulary: int
) -> list[Encoded]:
    """Rows encoded, 5 bytes a token; scored is the completion, its end included. A row that is longer than
    `max_length` or the model's `positions` is left out and counted.

    Raises:
        UserError: none is left, or too many do not fit the template.
    """
    out: list[Encoded] = []
    most, too_long = min(config.max_length, positions), 0
    for _, prompt, completion in encoded(rows, tokenizer, config.template, config, vocabulary):
        if len(prompt) + len(completion) <= most:
            ids = np.array(prompt + completion, np.int32)
            out.append((ids, np.arange(len(ids)) >= len(prompt)))
        else:
            too_long += 1
    limit = f"max_length={most}" if most == config.max_length else f"the model's context of {most} tokens"
    if not out:
        where = f" of {config.corpus}" if config.corpus else ""
        raise UserError(f"all {len(rows)} rows{where} exceed {limit}; raise it, or take shorter rows")
    if too_long:
        print(f"{too_long} of {len(rows)} rows exceed {limit}: left out")
    return out


def epoch_batches(encoded: list[Encoded], config: SftSettings, micro_tokens: int) -> Iterator[Batch]:
    """Packed updates, epoch after epoch; the order depends on seed and epoch alone."""
    for epoch in range(config.epochs):
        order = list(range(len(encoded)))
        random.Random(f"sft/{config.seed}/{epoch}").shuffle(order)
        group: list[Encoded] = []
        total = 0
        for i in order:
            total += len(encoded[i][0])
            if total > config.batch_tokens:
                yield pack_supervised(group, micro_tokens)
                group, total = [], len(encoded[i][0])
            group.append(encoded[i])
        yield pack_supervised(group, micro_tokens)


def run(config: SftSettings, run_dir: RunDir) -> None:
    """Train; leave `model/` and its corpus."""
    policy, tokenizer = guarded(run_dir, config.guard, lambda: tuned(config, run_dir))
    run_dir.save_model(lambda path: save_policy(policy, tokenizer, path, config.template, config.story))


def tuned(config: SftSettings, run_dir: RunDir) -> tuple[Policy, PreTrainedTokenizerFast]:
    """The trained policy and its tokenizer, from the newest checkpoint on; raises `Diverged`."""
    place = Place.open(config)
    start = run_dir.model_input(config.init_from)
    check_memory(start, place, config.optim, min(place.micro_tokens(config), config.batch_tokens))
    policy, tokenizer = load_policy(start, place.device)
    rows = gather(config, run_dir)
    run_dir.record_rows("the corpus of this stage", rows)
    shape = policy.config
    encoded = examples(rows, tokenizer, config, shape.max_position_embeddings, shape.vocab_size)
    write_corpus(run_dir.path / "corpus.jsonl", rows)
    updates = sum(1 for _ in epoch_batches(encoded, config, place.micro_tokens(config)))
    packed = epoch_batches(encoded, config, place.micro_tokens(config))  # one at a time: weights take memory
    print(f"{run_dir.stage.name}: {len(rows)} rows, {updates} updates")
    optim, guard = slowed(config.optim, run_dir), Guard(config.guard, config.optim.clip, era=run_dir.era)
    learner = Learner(policy, optim, updates, mtp_coef=config.mtp_coef, guard=guard)
    train_loop(run_dir, learner, packed, config.log_every, config.checkpoint_every)
    return policy, tokenizer
