"""Stage `report`: `runs/NAME/summary.json` for programs, `runs/NAME/report.html` for people.

It reads the other stages' directories and trains nothing, so it may be run at any time, and again.
"""

import json

from pipeline.errors import UserError
from pipeline.report.page import build_page, main_benchmark, read_transcripts
from pipeline.report.summary import read_stages, summarise
from pipeline.run.directory import RunDir
from pipeline.run.files import read_json, write_atomic
from pipeline.run.metrics import say
from pipeline.settings.evaluate import ReportSettings
from pipeline.stages.evaluate import print_table


def run(config: ReportSettings, run_dir: RunDir) -> None:
    """The stage."""
    folder = run_dir.path.parent
    scores_file = folder / "eval" / "scores.json"
    if not scores_file.is_file():
        raise UserError(f"no {scores_file}; score the models first: make eval ARGS='--name {config.name}'")
    state = read_json(scores_file)
    records = read_stages(folder)
    summary = summarise(state, records, config.seed)
    write_atomic(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    labels = [label for label in config.transcript_models if label in state["scores"]]
    files = {label: folder / "eval" / label / main_benchmark(state) / "generations.jsonl" for label in labels}
    page = build_page(config.name, state, records, summary, read_transcripts(files, config.transcripts))
    for path in (run_dir.path, folder):
        write_atomic(path / "report.html", page)
    print_table(state)
    say(f"summary: {folder / 'summary.json'}")
    say(f"report: {folder / 'report.html'}")
