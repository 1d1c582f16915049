"""`python -m pipeline chat --model DIR`: talk to a model in the terminal, thinking shown dim."""

import itertools
import sys
from contextlib import closing

from pipeline.settings.tools import ChatSettings
from pipeline.tools.conversation import Conversation, Message
from pipeline.tools.open import naming

DIM, PLAIN = "\033[2m", "\033[0m"


def main(config: ChatSettings) -> None:
    """Read messages from stdin, write answers to stdout, until the input ends."""
    talk = Conversation(config)
    terminal = sys.stdout.isatty()
    dim, plain = (DIM, PLAIN) if terminal else ("", "")
    messages: list[Message] = []
    with naming(config.model), closing(talk.engine):
        for turn in itertools.count():
            line = read_line(terminal)
            if line == "":
                return
            if line == "/new":
                messages = []
                continue
            messages.append({"role": "user", "content": line})
            ids, opened = talk.prompt(messages)
            answer, before, reason = "", "", ""
            for piece in talk.stream(ids, opened, config.params(seed=config.seed + turn)):
                for part, text in piece.texts:
                    if part != before:
                        sys.stdout.write(dim if part == "thinking" else plain + ("\n" if before else ""))
                        before = part
                    print(text, end="", flush=True)
                    answer += text if part == "answer" else ""
                reason = piece.finish_reason
            cut = " [cut at max_tokens]" if reason == "length" else ""
            print(f"{plain}{cut}", flush=True)
            messages.append({"role": "assistant", "content": answer.strip()})


def read_line(terminal: bool) -> str:
    """The next message; "" at the end."""
    if terminal:
        print("> ", end="", flush=True)
    return sys.stdin.readline().strip()
