"""`python -m pipeline doctor PATH [--model DIR]`: what is wrong with a run of RL or a dump of rollouts.

A line a finding; the last line on stdout is JSON, `{"findings": [{"kind", "evidence", "advice"}]}`.
"""

import json

from pipeline.data.decontaminate import copied
from pipeline.data.problems import data_folder, problems
from pipeline.doctor.findings import ADVICE, Finding
from pipeline.doctor.read import Dump, read
from pipeline.doctor.rollouts import examine
from pipeline.doctor.words import examine_words
from pipeline.errors import UserError
from pipeline.settings.rollouts import RejectSettings
from pipeline.settings.tools import DoctorSettings

BENCHMARKS = RejectSettings().heldout
"""Those that training leaves out."""


def benchmarks_held(dump: Dump, config: DoctorSettings) -> Finding | None:
    """Prompts hold problems of a benchmark; nothing is compared without the benchmarks' folder."""
    folder = data_folder(config.data)
    prompts = {row.prompt for row in dump.rows if row.prompt}
    if folder is None or not prompts:
        return None
    held = dict[str, int]()
    for name in BENCHMARKS:
        try:
            questions = [problem.question for problem in problems(name, data_dir=folder)]
        except UserError:  # not in this folder
            continue
        copies, near = copied(questions, prompts)
        held[name] = len(copies | near)
    told = ", ".join(f"{count} of {name}" for name, count in held.items() if count)
    return Finding("contamination", f"the {len(prompts)} prompts hold {told}") if told else None


def main(config: DoctorSettings) -> None:
    """Examine and print. Raises `UserError`: nothing can be read, or the model's tokenizer cannot."""
    dump = read(config.path)
    findings = examine(dump)
    findings += examine_words(dump, config.model) if config.model else []
    findings += [found] if (found := benchmarks_held(dump, config)) else []
    print(f"{config.path}: {len(dump.rows)} rollouts" + f", {len(dump.metrics)} steps" * bool(dump.metrics))
    if dump.keep > 1:
        print(f"it is large: one in {dump.keep} groups was examined")
    for why, count in dump.bad.most_common():
        print(f"left out: {count} x {why}")
    for each in findings:
        print(f"{each.kind}: {each.evidence}. {ADVICE[each.kind]}.")
    if not findings:
        print("nothing found")
    print(json.dumps({"findings": [each.row() for each in findings]}))
