"""`python -m pipeline STAGE --config FILE [--key value ...]`: the one way in.

Exit codes: 0 done, 2 the user's input is wrong, 1 a defect, 130 interrupted with everything saved.
"""

from __future__ import annotations

import difflib
import os
import sys
from importlib import import_module
from pathlib import Path

from pipeline import arguments
from pipeline.errors import UserError, command_line
from pipeline.table import COMMANDS, STAGES, Stage


def usage() -> str:
    """Every stage and command, one line each."""
    lines = ["usage: python -m pipeline STAGE --config FILE [--key value ...]", "", "stages of the chain:"]
    lines += [f"  {s.name:10} {s.summary}" for s in STAGES]
    lines += ["", "commands:"] + [f"  {c.name:10} {c.summary}" for c in COMMANDS]
    return "\n".join([*lines, "", "python -m pipeline STAGE --help lists every setting of a stage."])


def run_stage(stage: Stage, argv: list[str]) -> int:
    """Resolve the config, open the run directory, run the stage."""
    file = None
    argv = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    if "--config" in argv:
        at = argv.index("--config")
        if at + 1 == len(argv):
            raise UserError("--config needs a file, such as --config configs/tiny/grpo.toml")
        file, argv = Path(argv[at + 1]), argv[:at] + argv[at + 2 :]
    elif not {"--help", "-h"} & set(argv):
        raise UserError(
            f"{stage.name} needs --config FILE, such as --config configs/{stage.preset}/{stage.name}.toml"
        )
    config = arguments.load(stage, file, argv)

    from pipeline.run.directory import open_run  # after --help: it reads versions and hashes

    again = [arg for arg in argv if arg not in ("--resume", "--no-resume")]
    with open_run(
        stage, config, command_line(stage.name, *(["--config", str(file)] if file else []), *again)
    ) as run_dir:
        if run_dir is not None:
            import_module(stage.module).run(config, run_dir)
    return 0


def main(argv: list[str]) -> int:
    """Run a stage or command; turn errors into one line and an exit code."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    name, rest = argv[0], argv[1:]
    try:
        for command in COMMANDS:
            if command.name == name:
                if name == "up":  # it splits its line: what it does not know goes to the stage
                    return int(import_module(command.module).main(rest))
                prog = f"python -m pipeline {name}"
                settings = arguments.parse(command.settings, rest, prog, command.positional)
                return int(import_module(command.module).main(settings))
        for stage in STAGES:
            if stage.name == name:
                return run_stage(stage, rest)
        names = [s.name for s in STAGES] + [c.name for c in COMMANDS]
        near = difflib.get_close_matches(name, names, n=1)
        raise UserError(
            f"unknown stage {name!r}"
            + (f"; did you mean {near[0]}?" if near else f"; there are: {', '.join(names)}")
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # `| head` closed the pipe: not our defect
        return 0
    except KeyboardInterrupt as stop:
        print(f"\ninterrupted{f': {stop}' if stop.args else ''}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
