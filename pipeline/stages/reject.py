"""Stage `reject`: sample the RL model, keep what is right and readable (arXiv:2501.12948, Sec. 2.3.3).

The paper draws several completions a prompt, keeps the correct ones, and drops mixed languages and
repetition. What is left, with general data that RL did not cover, trains the second SFT and the students.
"""

from __future__ import annotations

from pipeline.data.corpus import Row, readable, split_blocks, write_corpus
from pipeline.errors import UserError
from pipeline.run.directory import RunDir
from pipeline.settings.reject import RejectSettings


def run(config: RejectSettings, run_dir: RunDir) -> None:
    """Sample and filter; leave `corpus.jsonl`."""
    from pipeline.data.generators import items
    from pipeline.data.problems import problems
    from pipeline.data.traces import curated, tagged
    from pipeline.stages.grpo import mean
    from pipeline.stages.rl import record
    from pipeline.train.policy import load_policy, set_up
    from rewards.reward import Scorer
    from rollout.open import engine_for
    from rollout.text.tokenizer import completion_text, make_prompt
    from rollout.types import Problem, SamplingParams

    set_up(config.seed, config.threads)
    policy, tokenizer = load_policy(run_dir.model_input(config.init_from))
    engine, scorer = engine_for(policy, tokenizer), Scorer({"accuracy": 1.0})
    pool: list[Problem] = []
    for source in config.problems:
        pool += problems(source, count=config.pool, split="train", seed=config.seed + 2, data_dir=config.data)
    rows: list[Row] = []
    steps = -(-len(pool) // config.prompts_per_step)
    try:
        for step in range(1, steps + 1):
            part = pool[(step - 1) * config.prompts_per_step : step * config.prompts_per_step]
            prompts = [make_prompt(tokenizer, p, config.template) for p in part]
            sampling = SamplingParams(
                max_tokens=config.max_tokens,
                temperature=config.temperature,
                n=config.samples,
                seed=config.seed * 1_000_003 + step,
            )
            rollouts = sorted(engine.generate(prompts, sampling), key=lambda r: (r.index, r.sample))
            texts = [completion_text(tokenizer, r, config.template) for r in rollouts]
            graded = scorer.grade_all(zip(rollouts, texts, strict=True))
            kept = 0
            for start in range(0, len(graded), config.samples):
                found: dict[str, Row] = {}
                for g in graded[start : start + config.samples]:
                    p, blocks = g.rollout.prompt.problem, split_blocks(g.text)
                    good = g.verdict == "correct" and g.parts["language"] >= config.min_language
                    if good and blocks and readable(blocks[0]):
                        text = tagged(*blocks)
                        source = f"reject:{p.source}"
                        found[text] = Row(p.id, p.question, text, blocks[1], p.language, p.kind, source)
                rows += list(found.values())[: config.keep]
                kept += len(found)
            run_dir.samples(step, [record(g, None) for g in graded[:: max(1, len(graded) // 20)]])
            metrics = {
                "data/kept": kept / len(graded),
                "reward/accuracy": mean([float(g.verdict == "correct") for g in graded]),
                "reward/language": mean([g.parts["language"] for g in graded]),
                "rollout/tokens_mean": mean([len(r.token_ids) for r in rollouts]),
                "rollout/truncated": mean([float(r.finish_reason == "length") for r in rollouts]),
            }
            run_dir.log(step, steps, metrics)
            run_dir.stop_if_interrupted()
    finally:
        engine.close()
        scorer.close()
    if not rows:
        raise UserError(
            f"reject kept nothing of {len(pool)} problems: {config.init_from} solves none; train it longer"
        )
    for item in items("general", config.general, "train", config.seed + 2) if config.general else ():
        p = item.problem()
        rows.append(Row(p.id, p.question, curated(item), item.answer, p.language, p.kind, "general"))
    write_corpus(run_dir.path / "corpus.jsonl", rows)
    print(f"reject: {len(rows)} rows kept -> {run_dir.path / 'corpus.jsonl'}")
