"""Stage `reject`: sample the RL model, keep what is right and readable (arXiv:2501.12948, Sec. 2.3.3).

The paper samples several completions a prompt, keeps the correct ones, and drops mixed languages and
repetition. What is left, with general data that RL did not cover, trains the second SFT and the students.
"""

from collections.abc import Sequence

from pipeline.data.corpus import Row, readable, split_blocks, tagged, write_corpus
from pipeline.data.jsonl import read_log
from pipeline.data.pool import pooled
from pipeline.data.traces import curated_rows
from pipeline.errors import Stopped, UserError
from pipeline.run.directory import RunDir
from pipeline.run.verifiers import check_sandbox
from pipeline.settings.rollouts import RejectSettings
from pipeline.train.place import Place
from pipeline.train.policy import load_policy, open_rollouts
from pipeline.train.rollouts import Watch, mean, transcript
from rewards.reward import Scorer
from rollout.collect import sample_groups
from rollout.engine import EngineDied, StaleWeights, Unanswerable
from rollout.text.tokenizer import completion_text, make_prompt
from rollout.types import Graded


def run(config: RejectSettings, run_dir: RunDir) -> None:
    """Sample and filter; leave `corpus.jsonl`."""
    place = Place.open(config)
    start = run_dir.model_input(config.init_from)
    policy, tokenizer = load_policy(start, place.device)
    pool = pooled(config, tokenizer, start, config.seed + 2)
    run_dir.record_rows(f"the problems of {', '.join(config.problems)}", pool)
    watch = Watch(run_dir, config.max_error_share)
    scorer = Scorer({"accuracy": 1.0}, allow_unsafe_code=config.allow_unsafe_code)
    check_sandbox("reject", scorer.pool, pool, config.allow_unsafe_code)
    engine = open_rollouts(policy, tokenizer, config.rollout, start)
    newest = run_dir.latest()
    done, kept = (newest[0], newest[1] / "kept.jsonl") if newest else (0, None)
    rows = [Row(**row) for row in read_log(kept)] if kept else []
    steps = -(-len(pool) // config.prompts_per_step)
    run_dir.metrics.begin()
    try:
        for step in range(done + 1, steps + 1):
            part = pool[(step - 1) * config.prompts_per_step : step * config.prompts_per_step]
            prompts = [make_prompt(tokenizer, p, config.template) for p in part]
            params = config.params(n=config.samples, seed=config.seed * 1_000_003 + step)
            rollouts = sample_groups(engine, prompts, params)
            texts = [completion_text(tokenizer, r, config.template) for r in rollouts]
            graded = scorer.grade_all(zip(rollouts, texts, strict=True))
            groups = [graded[i : i + config.samples] for i in range(0, len(graded), config.samples)]
            found = [keepers(group, config.min_language) for group in groups]
            rows.extend(row for group in found for row in group[: config.keep])
            run_dir.samples(step, [transcript(g, None) for g in graded[:: max(1, len(graded) // 20)]])
            metrics = {
                "data/kept": sum(map(len, found)) / len(graded),
                "reward/accuracy": mean([float(g.verdict == "correct") for g in graded]),
                "reward/language": mean([g.parts["language"] for g in graded]),
                "rollout/tokens_mean": mean([len(r.token_ids) for r in rollouts]),
                "rollout/truncated": mean([float(r.finish_reason == "length") for r in rollouts]),
            }
            run_dir.log(step, steps, metrics)
            watch.look(step, graded)
            watch.check()
            run_dir.checkpoint(step, lambda folder: write_corpus(folder / "kept.jsonl", rows))
            run_dir.stop_if_interrupted()
    except FloatingPointError as error:
        raise Stopped(f"{config.init_from}: {error}") from error
    except (EngineDied, StaleWeights, Unanswerable) as error:
        raise UserError(f"{error} To go on from the last step: {run_dir.command} --resume") from error
    finally:
        engine.close()
        scorer.close()
    if not rows:
        raise UserError(
            f"reject kept nothing of {len(pool)} problems: {config.init_from} solves none; train it longer"
        )
    rows += curated_rows("general", config.general, config.seed + 2, "general")
    write_corpus(run_dir.path / "corpus.jsonl", rows)
    print(f"reject: {len(rows)} rows kept -> {run_dir.path / 'corpus.jsonl'}")


def keepers(group: Sequence[Graded], min_language: float) -> list[Row]:
    """The different completions of one problem that are right, in format, readable and in its language."""
    found: dict[str, Row] = {}
    for g in group:
        p, blocks = g.rollout.prompt.problem, split_blocks(g.text)
        good = g.verdict == "correct" and g.parts["language"] >= min_language
        if good and blocks and readable(blocks[0]):
            text = tagged(*blocks)
            found[text] = Row(p.id, p.question, text, blocks[1], p.language, p.kind, f"reject:{p.source}")
    return list(found.values())
