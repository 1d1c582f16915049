"""Stage `pretrain`: the tiny base, a DeepSeek-V3 in miniature, trained from scratch on a synthetic corpus."""

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

from transformers import PreTrainedTokenizerFast as Tokenizer

from model import TINY, ModelConfig
from model.policy import Policy
from model.transformer import Transformer
from pipeline.data.generators import items
from pipeline.data.traces import SOLUTION, corpus, document, random_document
from pipeline.run.directory import RunDir
from pipeline.run.guard import Guard
from pipeline.run.rollback import guarded, slowed
from pipeline.settings.common import shared
from pipeline.settings.supervised import DocumentSettings, MtpSettings, PretrainSettings
from pipeline.train.learner import Learner
from pipeline.train.memory import check_memory
from pipeline.train.pack import Batch, Encoded, pack_supervised
from pipeline.train.place import Place
from pipeline.train.policy import save_policy
from pipeline.train.supervised import HeldOut, train_loop
from rollout.text.tokenizer import train_tokenizer

ASIDE = 1_000_003
"""Between the seeds of the stop rule's problems and of an evaluation's, which are small numbers."""


def batches(config: DocumentSettings, tokenizer: Tokenizer, micro_tokens: int) -> Iterator[Batch]:
    """Update `n` always gets the same documents, so a resumed run reads on where it stopped."""
    known = items(config.task, config.pool, "train", config.seed)
    for step in range(config.steps):
        rng = random.Random(f"documents/{config.seed}/{step}")
        docs: list[Encoded] = []
        total = 0
        while True:
            text = random_document(known, rng)
            ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
            del ids[config.max_length :]
            total += len(ids)
            if total > config.batch_tokens:
                break
            docs.append((ids, [True] * len(ids)))
        yield pack_supervised(docs, micro_tokens)


def held_out(config: DocumentSettings, tokenizer: Tokenizer, micro_tokens: int) -> Batch:
    """Worked documents about held-out problems, others than the evaluation's, their solutions scored."""
    rng, docs = random.Random(f"held out/{config.seed}"), list[Encoded]()
    known = items(config.task, 4 * config.stop.documents, "heldout", config.seed + ASIDE)
    for item in [item for item in known if item.steps][: config.stop.documents]:
        parts = document("untagged", item, rng).partition(SOLUTION)
        asked = tokenizer.encode(parts[0] + parts[1], add_special_tokens=False)
        ids = [*asked, *tokenizer.encode(parts[2], add_special_tokens=False), tokenizer.eos_token_id]
        docs.append((ids, [place >= len(asked) for place in range(len(ids))]))
    return pack_supervised(docs, micro_tokens)


def shape_of(config: DocumentSettings, tokenizer: Tokenizer, kind: type) -> dict[str, Any]:
    """The settings that a config of class `kind` has too, and what the tokenizer decides of it."""
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    ids = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad, "vocab_size": len(tokenizer)}
    return shared(config, kind) | ids


def run(config: PretrainSettings, run_dir: RunDir) -> None:
    """Train tokenizer and base; leave `model/`."""
    texts = itertools.islice(corpus(config.task, config.pool, config.seed), 20_000)
    tokenizer = train_tokenizer(texts, config.vocab_size)
    shape = dataclasses.replace(TINY, **shape_of(config, tokenizer, ModelConfig))
    mtp = shared(config, MtpSettings)
    pretrain(config, run_dir, tokenizer, shape, lambda: Transformer(shape, seed=config.seed), **mtp)


def pretrain(
    config: DocumentSettings,
    run_dir: RunDir,
    tokenizer: Tokenizer,
    shape: Any,
    fresh: Callable[[], Policy],
    **mtp: float,
) -> None:
    """Train the policy of config `shape` that `fresh` makes, and leave `model/`. `mtp`: see `Learner`."""

    def attempt() -> Policy:
        place, optim = Place.open(config), slowed(config.optim, run_dir)
        micro = place.micro_tokens(config)
        check_memory(shape, place, optim, min(micro, config.batch_tokens))
        net = fresh().train().to(place.device)
        guard = Guard(config.guard, config.optim.clip, era=run_dir.era)
        learner = Learner(net, optim, config.steps, guard=guard, **mtp)
        aside = HeldOut(held_out(config, tokenizer, micro), config.stop) if config.stop.loss else None
        packed = batches(config, tokenizer, micro)
        train_loop(run_dir, learner, packed, config.log_every, config.checkpoint_every, aside)
        return net

    net, story = guarded(run_dir, config.guard, attempt), run_dir.stage.summary
    run_dir.save_model(lambda path: save_policy(net, tokenizer, path, "r1-zero-short", story))
