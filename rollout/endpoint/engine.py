"""An OpenAI-compatible API as an engine: any served model, sampled in text.

Address and key are OPENAI_BASE_URL and OPENAI_API_KEY, as for OpenAI's client, which also retries: lost
connections, timeouts, rate limits (after the time that the server names) and server errors. Each rollout is
one chat request: the template's text as the only message, without system prompt or prefill; the server's own
chat template surrounds it. A setting that the server refuses is an error that names it. top_k 0 is not sent,
since the API does not know it: there a server's own default holds.

An API returns no token ids. A rollout has zeros in their place, as many as the server's `usage` counts, NaN as
log-probabilities, and its `text`. Nothing can be trained on such tokens.
"""

import hashlib
import json
import queue
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from rollout.endpoint.client import REASONS, Nonsense, address, completion, connect, explain
from rollout.engine import EngineDied, RolloutEngine, StaleWeights, Unanswerable
from rollout.settings import RolloutSettings
from rollout.text.templates import template_named
from rollout.text.tokenizer import train_tokenizer
from rollout.types import Prompt, Rollout, SamplingParams


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Stands for the unknown tokenizer of a served model: a token a byte, and messages as they are sent."""
    tokenizer = train_tokenizer([], 265)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    return tokenizer


class EndpointEngine(RolloutEngine):
    """`RolloutEngine` over `POST /chat/completions`."""

    def __init__(self, model: Path | str, settings: RolloutSettings, *, policy: Any = None, **_: Any) -> None:
        """Raises `ValueError` or `ModuleNotFoundError`: as `address` and `connect`, or there is a `policy` to
        generate from; `EngineDied`: no API answers at the address, or it refuses the key."""
        if policy is not None:
            raise ValueError(
                "rollout.engine = 'endpoint' returns no token ids to train on; reject takes it, and evaluate and "
                "generate as --engine endpoint."
            )
        self.model, self.settings, self.address = str(model), settings.endpoint, address()
        self.client = connect(self.settings)
        self.limit = "max_tokens"  # newer models of OpenAI call it max_completion_tokens
        self.models = list[str]()
        self.models = self.served()

    def served(self) -> list[str]:
        """The models at the address, as far as it lists them."""
        import openai

        client = self.client.with_options(max_retries=min(1, self.settings.retries))
        try:
            found = json.loads(client.models.with_raw_response.list().text)
            return [str(model["id"]) for model in found["data"]]
        except openai.OpenAIError as error:
            if getattr(error, "status_code", 0) in (404, 405, 501):
                return []  # some have no list
            raise self.died(error, {}) from error
        except (ValueError, TypeError, LookupError) as error:
            hint = "is no OpenAI-compatible API; OPENAI_BASE_URL mostly ends in /v1"
            raise EngineDied(f"the endpoint {self.address} {hint}.") from error

    def died(self, error: Exception, body: dict[str, Any]) -> EngineDied:
        """The error of a request that failed."""
        return EngineDied(explain(error, self.settings, body, self.models))

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Iterator[Rollout]:
        """As `RolloutEngine.generate`. Raises `Unanswerable`: a prompt without text, or stop tokens; and
        `EngineDied`, with what to do, after everything that was sampled has been yielded."""
        if sampling.stop_token_ids or not all(prompt.problem.question for prompt in prompts):
            raise Unanswerable("engine endpoint takes text, neither prompts of token ids nor stop_token_ids.")
        return self.sampled(prompts, sampling)

    def sampled(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Iterator[Rollout]:
        """The rollouts as they come, `in_flight` requests at a time. Daemon threads: they delay no exit."""
        pairs = [(i, s) for i in range(len(prompts)) for s in range(sampling.n)]
        todo, lock, over = iter(pairs), threading.Lock(), threading.Event()
        done: queue.SimpleQueue[tuple[Rollout, list[str]] | Exception | None] = queue.SimpleQueue()

        def work() -> None:
            while not over.is_set():
                with lock:
                    job = next(todo, None)
                if job is None:
                    break
                try:
                    done.put(self.ask(prompts[job[0]], *job, sampling))
                except Exception as error:  # raised again in the caller's thread
                    over.set()
                    done.put(error)
            done.put(None)

        working, odd, failed = min(self.settings.in_flight, len(pairs)), Counter[str](), list[Exception]()
        for _ in range(working):
            threading.Thread(target=work, daemon=True).start()
        try:
            while working:
                found = done.get()
                if found is None:
                    working -= 1
                elif isinstance(found, Exception):
                    failed.append(found)
                else:
                    odd.update(found[1])
                    yield found[0]
        finally:
            over.set()
        if odd:
            told = ", ".join(f"{number} {what}" for what, number in sorted(odd.items()))
            print(f"endpoint: of {len(pairs)} completions {told}", file=sys.stderr)
        if failed:
            raise failed[0]

    def ask(
        self, prompt: Prompt, index: int, sample: int, sampling: SamplingParams
    ) -> tuple[Rollout, list[str]]:
        """One rollout, and what is strange about it."""
        text, tokens, reason = self.answer(self.body(prompt, index, sample, sampling))
        odd = [] if reason in ("stop", "length") else [f"ended by {reason}"]
        odd += [] if text.strip() else ["without text"]
        odd += ["without usage, so that their length is in bytes"] if tokens is None else []
        n = len(text.encode(errors="replace")) if tokens is None else tokens
        rollout = Rollout(prompt, index, sample, [0] * n, [float("nan")] * n, REASONS[reason], text=text)
        return rollout, odd

    def body(self, prompt: Prompt, index: int, sample: int, sampling: SamplingParams) -> dict[str, Any]:
        """A request; its seed is a hash of (seed, index, sample), of 31 bits, which every server takes."""
        name = f"{sampling.seed} {sampling.first_index + index} {sample}".encode()
        question = template_named(prompt.template).text.format(question=prompt.problem.question)
        body: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": question}]}
        body |= {
            self.limit: sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        if self.settings.send_seed:
            body["seed"] = int.from_bytes(hashlib.sha256(name).digest()[:4], "little") >> 1
        body |= {"stop": list(sampling.stop)} if sampling.stop and not sampling.ignore_eos else {}
        names = ("top_k", "min_tokens", "ignore_eos")  # vLLM's, SGLang's and others' own
        more = {name: value for name in names if (value := getattr(sampling, name))}
        return body | ({"extra_body": more} if more else {})

    def answer(self, body: dict[str, Any]) -> tuple[str, int | None, str]:
        """See `completion`. An answer that is none is requested again, as often as a failed request.
        Raises `EngineDied`."""
        import openai

        for left in range(self.settings.retries, -1, -1):
            try:
                return completion(self.client.chat.completions.with_raw_response.create(**body).text)
            except openai.OpenAIError as error:
                if "max_tokens" not in body or "max_completion_tokens" not in str(error):
                    raise self.died(error, body | body.get("extra_body", {})) from error
                self.limit = "max_completion_tokens"
                break
            except Nonsense as error:
                if not left:
                    raise EngineDied(f"the endpoint {self.address} answers with {error}") from error
        return self.answer({self.limit if key == "max_tokens" else key: body[key] for key in body})

    def load_weights(self, source: Any, version: int) -> None:
        """Raises `StaleWeights`: a served model has its own."""
        raise StaleWeights(f"{self.model} at {self.address} takes no weights.")

    def close(self) -> None:
        """Close the connections."""
        self.client.close()
