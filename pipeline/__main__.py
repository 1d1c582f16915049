"""`python -m pipeline STAGE --config FILE [--key value ...]`: the one way in.

Exit codes: 0 done, 2 the user's input is wrong, 1 a defect, 3 a guard stopped the run (the last good
checkpoint is kept), 130 interrupted with everything saved.
"""

import errno
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from pipeline.arguments import HELP, load, nearest, parse
from pipeline.errors import Stopped, UserError, command_line
from pipeline.table import COMMANDS, STAGES, Command, Stage

REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR}
REFUSED |= {errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}
"""What the system says of a path that a user chose badly."""


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
    elif not set(HELP) & set(argv):
        example = f"configs/{stage.preset}/{stage.name}.toml"
        raise UserError(f"{stage.name} needs --config FILE, such as --config {example}")
    config = load(stage, file, argv)

    from pipeline.run.directory import open_run  # after --help: it reads versions and hashes
    from pipeline.run.ranks import together

    kept = [arg for arg in argv if arg not in ("--resume", "--no-resume")]
    again = command_line(stage.name, *(["--config", str(file)] if file else []), *kept)
    with together(again), open_run(stage, config, again) as run_dir:
        if run_dir is not None:
            import_module(stage.module).run(config, run_dir)
    return 0


def run_command(command: Command, argv: list[str]) -> int:
    """Resolve the settings, which needs no torch, and run the command; its exit code."""
    config: Any = argv
    if command.name not in ("up", "replay") or set(HELP) & set(argv):  # these take settings of stages too
        config = parse(command.settings, argv, f"python -m pipeline {command.name}", command.positional)
    return import_module(command.module).main(config) or 0


def main(argv: list[str]) -> int:
    """Run a stage or command; turn errors into one line and an exit code."""
    # The bars of transformers and of the hub would cut through our lines; workers inherit this.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not argv or argv[0] in (*HELP, "help"):
        print(usage())
        return 0 if argv else 2
    name, *rest = argv
    entries = {entry.name: entry for entry in (*STAGES, *COMMANDS)}
    try:
        match entries.get(name):
            case Stage() as stage:
                return run_stage(stage, rest)
            case Command() as command:
                return run_command(command, rest)
        hint = nearest(name, entries) or f"; there are: {', '.join(entries)}"
        raise UserError(f"unknown stage {name!r}{hint}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as stop:
        print(f"stopped: {stop}", file=sys.stderr)
        return 3
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `| head` closed the pipe: no defect
        return 0
    except OSError as error:
        if error.errno not in REFUSED or error.filename is None:
            raise
        print(f"error: {str(error.filename)[:200]}: {error.strerror}; name another path", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"\ninterrupted{f': {stop}' if stop.args else ''}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
