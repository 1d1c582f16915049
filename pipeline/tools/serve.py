"""`python -m pipeline serve --model DIR`: an endpoint with OpenAI's protocol.

Where vLLM is installed, vLLM's own server runs, with the settings that our models need. Elsewhere a small
server runs on our engines: `/v1/models`, `/v1/completions`, `/v1/chat/completions`, streaming or not.
Thinking is separate, in `reasoning_content`. Concurrent requests alternate, a few tokens each.
"""

import importlib.util
import itertools
import json
import os
import sys
import time
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pipeline.errors import UserError
from pipeline.settings.tools import ServeSettings
from pipeline.tools.conversation import Conversation, Reply
from pipeline.tools.open import check_model
from rollout.engine import EngineDied
from rollout.types import SamplingParams
from rollout.vllm.options import server_flags

MOST_BYTES = 8 << 20
"""Longest request."""
PATHS = ("/v1/completions", "/v1/chat/completions")


def sampling_of(body: dict[str, Any], config: ServeSettings) -> SamplingParams:
    """The sampling parameters of a request; settings of the server where it has none."""
    if body.get("n", 1) != 1:
        raise ValueError("n must be 1")
    most = body.get("max_completion_tokens") or body.get("max_tokens") or config.max_tokens
    seed = body.get("seed")
    try:
        return SamplingParams(
            max_tokens=int(most),
            temperature=float(body.get("temperature", config.temperature)),
            top_p=float(body.get("top_p", config.top_p)),
            top_k=int(body.get("top_k", config.top_k)),
            seed=uuid.uuid4().int & (2**63 - 1) if seed is None else int(seed),
        )
    except (TypeError, OverflowError) as error:
        raise ValueError(str(error)) from error


def prompt_of(talk: Conversation, body: dict[str, Any], chat: bool) -> tuple[list[int], bool]:
    """The token ids that a request asks to go on from, and whether they end inside an open think tag."""
    if chat:
        messages = body.get("messages")
        good = isinstance(messages, list) and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )
        if not good or not messages:
            raise ValueError("messages must be a list of {role, content}, content a string, at least one")
        return talk.prompt(messages)
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and all(type(i) is int for i in prompt):
        return prompt, False
    if not isinstance(prompt, str) or not prompt:
        raise ValueError("prompt must be a string or a list of token ids, and not empty")
    return talk.tokenizer.encode(prompt), False


def response(
    talk: Conversation, config: ServeSettings, body: dict[str, Any], chat: bool
) -> Iterator[dict[str, Any]]:
    """The response's chunks, the last with finish reason and usage.

    Raises:
        ValueError: before the first chunk, for a bad request.
    """
    sampling = sampling_of(body, config)
    ids, opened = prompt_of(talk, body, chat)
    stop = body.get("stop") or []
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(text, str) and text for text in stops):
        raise ValueError("stop must be a string or a list of strings, none of them empty")
    reply = Reply(len(ids))
    kind = "chat.completion.chunk" if chat else "text_completion"
    identity = f"cmpl-{uuid.uuid4().hex[:16]}"
    common = {"id": identity, "object": kind, "created": int(time.time()), "model": model_name(config)}

    def chunk(delta: dict[str, str], reason: str | None) -> dict[str, Any]:
        choice = {"delta": delta} if chat else {"text": delta.get("content", "")}
        return common | {"choices": [{"index": 0, **choice, "finish_reason": reason}]}

    for part, text in talk.stream(ids, opened, sampling, reply, stops):
        key = "content" if part == "answer" or not chat else "reasoning_content"
        yield chunk({key: text}, None)
    usage = {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.tokens}
    yield chunk({}, reply.finish_reason) | {"usage": usage | {"total_tokens": sum(usage.values())}}


def join_chunks(chunks: list[dict[str, Any]], chat: bool) -> dict[str, Any]:
    """The chunks of a response as one object."""
    texts = {"content": "", "reasoning_content": ""}
    for chunk in chunks:
        choice = chunk["choices"][0]
        for key, text in (choice["delta"] if chat else {"content": choice["text"]}).items():
            texts[key] += text
    last = chunks[-1]
    choice = {"index": 0, "finish_reason": last["choices"][0]["finish_reason"]}
    if chat:
        choice["message"] = {"role": "assistant", **texts}
    else:
        choice["text"] = texts["content"]
    return last | {"object": "chat.completion" if chat else "text_completion", "choices": [choice]}


def make_handler(talk: Conversation, config: ServeSettings) -> type[BaseHTTPRequestHandler]:
    """The request handler of one model."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            """One line a request would bury the server's own."""

        def reply(self, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body, ensure_ascii=False).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def refuse(self, status: int, message: str) -> None:
            self.close_connection = True
            error = {"message": message, "type": "invalid_request_error", "code": status}
            self.reply(status, {"error": error})

        def do_GET(self) -> None:
            if self.path == "/health":
                self.reply(200, {})
            elif self.path == "/v1/models":
                self.reply(200, {"object": "list", "data": [{"id": model_name(config), "object": "model"}]})
            else:
                self.refuse(404, f"no {self.path}; there are /v1/models, {' and '.join(PATHS)}")

        def do_POST(self) -> None:
            chat = self.path == PATHS[1]
            try:
                if self.path not in PATHS:
                    return self.refuse(404, f"no {self.path}; there are {' and '.join(PATHS)}")
                chunks = response(talk, config, self.body(), chat)
                first = next(chunks)  # a bad request is refused before anything is sent
            except ValueError as error:
                return self.refuse(400, str(error))
            except (FloatingPointError, EngineDied) as error:
                return self.refuse(500, str(error))
            if not self.streaming:
                return self.reply(200, join_chunks([first, *chunks], chat))
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
            self.close_connection = True
            for chunk in itertools.chain([first], chunks):
                self.event(json.dumps(chunk, ensure_ascii=False))
            self.event("[DONE]")

        def event(self, data: str) -> None:
            self.wfile.write(f"data: {data}\n\n".encode())
            self.wfile.flush()

        def body(self) -> dict[str, Any]:
            try:
                length = int(self.headers.get("Content-Length", ""))
            except ValueError:
                raise ValueError("Content-Length is missing") from None
            if not 0 <= length <= MOST_BYTES:
                raise ValueError(f"a request has at most {MOST_BYTES} bytes")
            try:
                found = json.loads(self.rfile.read(length))
            except ValueError as error:
                raise ValueError(f"not JSON: {error}") from error
            if not isinstance(found, dict):
                raise ValueError("the request is not a JSON object")
            self.streaming = bool(found.get("stream"))
            return found

    return Handler


def make_server(config: ServeSettings, talk: Conversation) -> ThreadingHTTPServer:
    """A server that listens; its `serve_forever` answers.

    Raises:
        UserError: the address is not available.
    """
    try:
        server = ThreadingHTTPServer((config.host, config.port), make_handler(talk, config))
    except OSError as error:
        address = f"{config.host}:{config.port}"
        raise UserError(f"cannot listen on {address}: {error.strerror}; choose another --port") from error
    server.daemon_threads = True
    return server


def model_name(config: ServeSettings) -> str:
    """The model's name in requests."""
    folder = config.model.resolve()
    return config.name or (folder.parent.name if folder.name == "model" else folder.name)


def vllm_command(config: ServeSettings) -> list[str]:
    """vLLM's own server, set up as `rollout.vllm.engine` sets up its engine."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(config.model)]
    command += ["--served-model-name", model_name(config), "--host", config.host, "--port", str(config.port)]
    return command + server_flags(config.model, config.dtype, config.vllm)


def main(config: ServeSettings) -> None:
    """The command; runs until Ctrl-C."""
    check_model(config.model)
    installed = importlib.util.find_spec("vllm") is not None
    if config.engine == "vllm" or (config.engine == "auto" and installed):
        if not installed:
            raise UserError("vLLM is not installed here; make .venv-vllm/stamp, and take its bin/python")
        command = vllm_command(config)
        os.execv(command[0], command)  # the environment is already set; Ctrl-C and exit code are vLLM's
    talk = Conversation(config)
    server = make_server(config, talk)
    host, port = server.server_address[:2]
    print(f"serving {model_name(config)} at http://{host!s}:{port}/v1 (Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    finally:
        server.server_close()
        talk.engine.close()
