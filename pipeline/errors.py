"""Errors that a user can cause, and what to type next."""

import shlex
import sys
from pathlib import Path


class UserError(Exception):
    """Bad input. The message is one line: what was found, what to do. The exit code is 2."""


class Stopped(Exception):
    """A guard stopped the run. The message is one line: which guard, what it saw, what to do. The last good
    checkpoint is kept. The exit code is 3."""


def command_line(*argv: str) -> str:
    """What to type to run this, with this environment's Python when it lies below the working directory."""
    python = Path(sys.executable)
    here = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else "python"
    return shlex.join([str(here), "-m", "pipeline", *argv])
