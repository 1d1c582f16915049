"""`python -m pipeline chat --model DIR`: talk to a model in the terminal, thinking shown dim."""

from __future__ import annotations

import itertools
import sys

from pipeline.errors import UserError
from pipeline.settings.tools import ChatSettings
from pipeline.tools.conversation import Conversation, Message, Reply
from rollout.engine import EngineDied

DIM, PLAIN = "\033[2m", "\033[0m"


def run(config: ChatSettings) -> None:
    """Read messages from stdin, write answers to stdout, until the input ends."""
    talk = Conversation(config)
    terminal = sys.stdout.isatty()
    dim, plain = (DIM, PLAIN) if terminal else ("", "")
    messages: list[Message] = []
    try:
        for turn in itertools.count():
            line = read_line(terminal)
            if line == "":
                return
            if line == "/new":
                messages = []
                continue
            messages.append({"role": "user", "content": line})
            ids, opened = talk.prompt(messages)
            reply, answer, before = Reply(len(ids)), "", ""
            for part, text in talk.stream(ids, opened, config.params(seed=config.seed + turn), reply):
                if part != before:
                    sys.stdout.write(dim if part == "thinking" else plain + ("\n" if before else ""))
                    before = part
                sys.stdout.write(text)
                sys.stdout.flush()
                answer += text if part == "answer" else ""
            cut = " [cut at max_tokens]" if reply.finish_reason == "length" else ""
            sys.stdout.write(f"{plain}{cut}\n")
            sys.stdout.flush()
            messages.append({"role": "assistant", "content": answer.strip()})
    except (ValueError, FloatingPointError, EngineDied) as error:
        raise UserError(f"{config.model}: {error}") from error
    finally:
        talk.engine.close()


def read_line(terminal: bool) -> str:
    """The next message; "" at the end."""
    if terminal:
        sys.stdout.write("> ")
        sys.stdout.flush()
    return sys.stdin.readline().strip()


def main(config: ChatSettings) -> int:
    """The command."""
    run(config)
    return 0
