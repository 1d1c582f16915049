"""Stage `reject`: sample the RL model, keep what is right and readable (arXiv:2501.12948, Sec. 2.3.3).

The paper samples several completions a prompt, keeps the correct ones, and drops mixed languages and
repetition. What is left, with general data that RL did not cover, trains the second SFT and the students.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from pipeline.data.card import corpus_card
from pipeline.data.corpus import Row, canonical, readable, split_blocks, tagged, write_corpus
from pipeline.data.jsonl import read_log
from pipeline.data.pool import pooled
from pipeline.data.traces import curated_rows
from pipeline.errors import Stopped, UserError
from pipeline.run.directory import RunDir
from pipeline.run.files import read_json, write_atomic
from pipeline.run.verifiers import check_sandbox
from pipeline.settings.rollouts import RejectSettings
from pipeline.tools.open import open_served
from pipeline.train.place import Place
from pipeline.train.policy import load_policy, open_rollouts
from pipeline.train.rollouts import Watch, mean, transcript
from rewards.reward import Scorer
from rollout.collect import sample_groups
from rollout.endpoint.engine import address
from rollout.engine import EngineDied, StaleWeights, Unanswerable
from rollout.text.tokenizer import completion_text, make_prompt
from rollout.types import Graded


def run(config: RejectSettings, run_dir: RunDir) -> None:
    """Sample and filter; leave `corpus.jsonl` and its card, README.md."""
    place = Place.open(config)
    start = policy = None
    if config.rollout.engine == "endpoint":
        engine, tokenizer = open_served(config.init_from, config.rollout.endpoint)
    else:
        start = run_dir.model_input(config.init_from)
        policy, tokenizer = load_policy(start, place.device)
    pool = pooled(config, tokenizer, start, config.seed + 2, run_dir)
    watch = Watch(run_dir, config.max_error_share)
    scorer = Scorer({"accuracy": 1.0}, allow_unsafe_code=config.allow_unsafe_code)
    check_sandbox("reject", scorer.pool, pool, config.allow_unsafe_code)
    if policy is not None and start is not None:
        engine = open_rollouts(policy, tokenizer, config.rollout, start)
    done, rows, fates = 0, list[Row](), Counter[str]()
    if newest := run_dir.latest():
        done, rows = newest[0], [Row(**row) for row in read_log(newest[1] / "kept.jsonl")]
        if state := read_json(newest[1] / "state.json"):
            fates.update(state["fates"])
            watch.load_state_dict(state["watch"])

    def save(folder: Path) -> None:
        write_corpus(folder / "kept.jsonl", rows)
        state = {"fates": fates, "watch": watch.state_dict()}
        write_atomic(folder / "state.json", json.dumps(state) + "\n")

    size = config.prompts_per_step or (32 if config.rollout.engine == "endpoint" else 500)
    steps = -(-len(pool) // size)
    run_dir.metrics.begin()
    try:
        for step in range(done + 1, steps + 1):
            part = pool[(step - 1) * size : step * size]
            prompts = [make_prompt(tokenizer, p, config.template) for p in part]
            params = config.params(n=config.samples, seed=config.seed * 1_000_003 + step)
            rollouts = sample_groups(engine, prompts, params)
            texts = [completion_text(tokenizer, r, config.template) for r in rollouts]
            graded = scorer.grade_all(zip(rollouts, texts, strict=True))
            run_dir.samples(step, [transcript(g, None) for g in graded[:: max(1, len(graded) // 20)]])
            run_dir.log(step, steps, keep(graded, config, rows, fates))
            watch.look(step, graded)
            watch.check()
            run_dir.checkpoint(step, save)
            run_dir.stop_if_interrupted()
    except FloatingPointError as error:
        raise Stopped(f"{config.init_from}: {error}") from error
    except (EngineDied, StaleWeights, Unanswerable) as error:
        raise UserError(f"{error} To go on from the last step: {run_dir.command} --resume") from error
    finally:
        engine.close()
        scorer.close()
    if not rows:
        why = ", ".join(f"{n} {name}" for name, n in fates.most_common() if n)
        way = f"train {config.init_from} longer, or take another --template or model"
        raise UserError(f"reject kept nothing of {len(pool)} problems ({why}): {way}")
    leave(config, run_dir, rows, fates, len(pool), start, tokenizer)


def leave(
    config: RejectSettings,
    run_dir: RunDir,
    rows: list[Row],
    fates: Counter[str],
    problems: int,
    start: Path | None,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Add general data to `rows`, and write corpus and card. `start`: the teacher's directory, if any."""
    rows += curated_rows("general", config.general, config.seed + 2)
    env = run_dir.environment()
    digest = env["inputs"].get(str(start), start and start.name)
    apart = env.get("decontamination", "generated problems are held out by construction")
    teacher = f"{config.init_from}, {f'sha256 {digest}' if start else f'served at {address()}'}"
    facts = {"teacher": teacher, "problems": problems, "benchmarks": apart, "run with": run_dir.command}
    toml = (run_dir.path / "config.toml").read_text()
    card, sizes = corpus_card(rows, facts, fates, toml, tokenizer if start else None)
    write_atomic(run_dir.path / "README.md", card)
    write_corpus(run_dir.path / "corpus.jsonl", rows)
    print(f"reject: {len(rows)} rows kept -> {run_dir.path / 'corpus.jsonl'}; {sizes}")


def keep(
    graded: Sequence[Graded], config: RejectSettings, rows: list[Row], fates: Counter[str]
) -> dict[str, float]:
    """Add what is kept of a step's completions to `rows`, and count them all in `fates`; the metrics."""
    groups = [graded[i : i + config.samples] for i in range(0, len(graded), config.samples)]
    found = [keepers(group, config.min_language) for group in groups]
    rows.extend(row for group in found for row in group[: config.keep])
    fates.update(fate(g, config.min_language) for g in graded)
    fates["repeated"] += fates.pop("right", 0) - sum(map(len, found))
    fates["more than keep"] += sum(max(0, len(group) - config.keep) for group in found)
    fates["kept"] = len(rows)
    return {
        "data/kept": sum(map(len, found)) / len(graded),
        "reward/accuracy": mean([float(g.verdict == "correct") for g in graded]),
        "reward/language": mean([g.parts["language"] for g in graded]),
        "rollout/tokens_mean": mean([len(g.rollout.token_ids) for g in graded]),
        "rollout/truncated": mean([float(g.rollout.finish_reason == "length") for g in graded]),
    }


def blocks_of(g: Graded) -> tuple[str, str] | None:
    """Thought and answer of a completion. Where no tags were asked for, of a served model or by template
    boxed, everything after the thinking is the answer."""
    free = g.rollout.text is not None or g.rollout.prompt.template == "boxed"
    return split_blocks(g.text) or (split_blocks((canonical(g.text) or "-")[0]) if free else None)


def fate(g: Graded, min_language: float) -> str:
    """What becomes of a sampled completion: the first filter that drops it, or `right`."""
    blocks = blocks_of(g)
    if g.verdict != "correct":
        return "verifier failed" if g.verdict == "error" else "wrong"
    if g.parts["language"] < min_language:
        return "in another language"
    return "not in format" if not blocks else "right" if readable(blocks[0]) else "not readable"


def keepers(group: Sequence[Graded], min_language: float) -> list[Row]:
    """The different completions of one problem that are right, in format, readable and in its language."""
    found: dict[str, Row] = {}
    for g in group:
        p, blocks = g.rollout.prompt.problem, blocks_of(g)
        if blocks and fate(g, min_language) == "right":
            text = tagged(*blocks)
            found[text] = Row(p.id, p.question, text, blocks[1], p.language, p.kind, f"reject:{p.source}")
    return list(found.values())
