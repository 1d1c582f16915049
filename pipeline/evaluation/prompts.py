"""How a benchmark's questions become prompts, and how many samples each gets: R1's protocol by default.

Papers  k of 4 to 64 by the size of the set, boxed answer, no system prompt   arXiv:2501.12948  Sec. 3
        `<think>\\n` opened for the model   DeepSeek-R1's README, Usage Recommendations
        worked examples before the question   arXiv:2005.14165  Sec. 2.4
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast as Tokenizer

from pipeline.data.decontaminate import decontaminate
from pipeline.data.problems import BENCHMARKS, data_folder
from pipeline.data.solutions import read_solutions, worked_steps
from pipeline.errors import UserError
from pipeline.settings.evaluate import EvaluateSettings
from pipeline.tools.open import trained_template
from rollout.text.templates import next_question, template_named
from rollout.text.tokenizer import Shots, make_prompt, prefill
from rollout.types import Problem, Prompt

SMALL = {"aime24": 64, "aime25": 64, "amc23": 32, "humaneval": 8}
"""Samples of the benchmarks with fewer than 250 problems, whatever part of them is asked."""
FEWEST, MOST, COMPLETIONS = 4, 64, 2_000
"""Samples of a problem, and how many completions k is chosen for: 4 of MATH-500's 500, 64 of AIME's 30."""
TRAINING = {"gsm8k": "gsm8k_train", "math500": "math_train"}
"""A benchmark's own training set, with worked solutions."""


def samples_of(config: EvaluateSettings, n: int) -> int:
    """k of a set of `n` problems: `config.samples`, or the default of `EvaluateSettings` where that is 0."""
    if config.samples or config.temperature == 0:
        return config.samples or 1
    if config.benchmark in BENCHMARKS:
        return SMALL.get(config.benchmark, FEWEST)
    power: int = 1 << (max(1, COMPLETIONS // n).bit_length() - 1)
    return min(MOST, max(FEWEST, power))


def worked_shots(config: EvaluateSettings, found: Sequence[Problem]) -> Shots:
    """`config.shots` worked examples, evenly spaced through their source; none is a copy, or near copy, of a
    question that is asked. Raises `UserError`: no source, or too few examples in it."""
    if not config.shots:
        return ()
    source = config.shots_from or TRAINING.get(config.benchmark, "")
    if not source or all(problem.kind == "code" for problem in found):
        why = "no training set of worked answers is known for it; name one with --shots-from, or --shots 0"
        raise UserError(f"{config.benchmark}: shots={config.shots}, and {why}")
    read = read_solutions(source, data_folder(config.data), config)
    solved = {p.id: (p, text) for p, text in read if p.kind == "math" and text.strip() not in ("", p.answer)}
    kept = decontaminate([problem for problem, _ in solved.values()], found)
    if len(kept) < config.shots:
        few = f"{len(kept)} worked examples that are no copies of the questions, fewer than shots"
        raise UserError(f"{source} has {few}={config.shots}; lower --shots, or name another --shots-from")
    picked = [kept[i * len(kept) // config.shots] for i in range(config.shots)]
    return [(p.question.strip(), worked_steps(solved[p.id][1], p.answer)) for p in picked]


def template_names(config: EvaluateSettings, tokenizer: Tokenizer) -> tuple[str, str]:
    """The templates of questions and of programs to write, which have no box.
    Raises `UserError`: worked examples in a template that does not mark where a question begins."""
    name = config.template if config.template != "auto" else trained_template(config.model) or "auto"
    code = name
    if name == "auto":
        name, code = "qa" if config.shots else "raw", "raw"
        if tokenizer.chat_template:  # one that knows thinking, but leaves the tag to the model, gets it
            knows = "</think>" in str(tokenizer.chat_template)
            name = "boxed-think" if knows and not prefill(tokenizer, "boxed") else "boxed"
            code = "r1" if prefill(tokenizer, name) else "plain"
    if config.shots and not (template_named(name).chat or next_question(name)):
        raise UserError(f"template {name} does not mark where a question begins; --shots needs one: qa")
    return name, code


def make_prompts(
    config: EvaluateSettings, found: Sequence[Problem], tokenizer: Tokenizer, shots: Shots
) -> list[Prompt]:
    """The problems as the model sees them; programs to write without worked examples."""
    name, code = template_names(config, tokenizer)
    return [
        make_prompt(tokenizer, p, code) if p.kind == "code" else make_prompt(tokenizer, p, name, shots)
        for p in found
    ]
