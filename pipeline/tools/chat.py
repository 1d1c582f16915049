"""`python -m pipeline chat --model DIR`: talk to a model in the terminal, thinking shown dim."""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass

from pipeline.arguments import parse, refuse_unknown
from pipeline.errors import UserError
from pipeline.tools.open import ModelSettings
from rollout.engine import EngineDied
from rollout.types import SamplingParams

PROG = "python -m pipeline chat"
DIM, PLAIN = "\033[2m", "\033[0m"


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(ModelSettings):
    """Talk to a model. An empty line or Ctrl-D ends it, /new begins a new conversation."""

    max_tokens: int = 1_024
    """Longest answer, thinking included, tokens."""
    temperature: float = 0.6
    """Divides the logits; 0 = greedy (R1's own advice: 0.6)."""
    top_p: float = 0.95
    """Sample from the smallest set of likeliest tokens with this mass; 1 = all."""
    seed: int = 0
    """Of the sampling; each turn has its own."""

    def __post_init__(self) -> None:
        ModelSettings.__post_init__(self)
        self.sampling(0)  # checks the ranges

    def sampling(self, turn: int) -> SamplingParams:
        """The part that the engine sees."""
        return SamplingParams(
            max_tokens=self.max_tokens, temperature=self.temperature, top_p=self.top_p, seed=self.seed + turn
        )


def run(config: Config) -> None:
    """Read messages from stdin, write answers to stdout, until the input ends."""
    from pipeline.tools.conversation import Conversation, Message, Said

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
            said, answer, before = Said(len(ids)), "", ""
            for part, text in talk.speak(ids, opened, config.sampling(turn), said):
                if part != before:
                    sys.stdout.write(dim if part == "thinking" else plain + ("\n" if before else ""))
                    before = part
                sys.stdout.write(text)
                sys.stdout.flush()
                answer += text if part == "answer" else ""
            cut = " [cut at max_tokens]" if said.finish_reason == "length" else ""
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


def main(argv: list[str]) -> int:
    """The command."""
    refuse_unknown(Config, argv, PROG)
    run(parse(Config, argv, PROG))
    return 0
